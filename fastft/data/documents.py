"""Rows that another tool has packed: where the documents in them begin.

Such a row is one example with several documents, and says so by one of these columns:

    position_ids    a number for each token, 0 again (or position_ids_start) where a document begins
    seq_idx         a number for each token, another one in the next document
    attention_mask  1, 1, 2, 2, 2, 3 ...: the number of the document, 0 where a token is masked
    seq_lengths     the tokens of each document, as TRL's packing has them
    cu_seq_lens     where documents begin, and the tokens of the row; also as cu_seq_lens_q,
                    cu_seq_lens_k, cu_seqlens

Any of them cuts. A document that begins at another position than all others, or positions that jump
(shared prefixes, positions drawn with gaps), cannot be numbered anew without training something
else: that is an error. Tokens that are masked count for nothing here; they stay with the document
before them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.data.column_rows import Column
from fastft.data.columns import (
    Columns,
    check_lengths,
    drop_masked,
    flatten_integers,
    lengths_of,
    take_mask,
)
from fastft.data.keys import CU_SEQLENS_K, CU_SEQLENS_Q, LABEL_KEYS, SEQ_IDX
from fastft.data.processed import holds_images

POSITIONS, NUMBERS, MASK, SIZES = "position_ids", SEQ_IDX, "attention_mask", "seq_lengths"
BORDERS = ("cu_seq_lens", CU_SEQLENS_Q, CU_SEQLENS_K, "cu_seqlens")
LIST_KEYS = (SIZES, *BORDERS)  # with as many numbers as there are documents, not tokens
KEYS = frozenset((POSITIONS, NUMBERS, *LIST_KEYS))


def telling(columns: Columns) -> list[str]:
    """Names the columns that tell which tokens are real, and where documents begin.

    A list there counts whatever it holds: left out, the tokens would be laid out as if nobody had
    told anything.
    """
    return [
        key
        for key, values in columns.items()
        if (key == MASK or key in KEYS) and any(map(_is_listed, values))
    ]


def _is_listed(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value)
    return getattr(value, "ndim", 0) > 0 and len(value) > 0


def split_documents(
    columns: Columns, counts: list[int], start: int = 0, undivided: str = ""
) -> tuple[Columns, list[int], list[int]]:
    """Checks the columns, makes an example of each document and leaves out what is masked.

    Args:
        columns: of the examples. `attention_mask` is taken out.
        counts: how many examples each feature is.
        start: a position at which documents may begin besides 0.
        undivided: why no example may be several documents, part of a sentence; empty where it may.

    Returns:
        The columns, without those which say where documents begin; the tokens of each example; and
        how many of them each feature is.

    Raises:
        ValueError: an example has no tokens, or a column another number of values; documents that
            cannot be told apart, or must not be.
    """
    lengths = lengths_of("input_ids", columns["input_ids"])
    for key, values in columns.items():
        if key != "input_ids" and key not in LIST_KEYS:
            check_lengths(key, values, lengths, "input_ids")
    mask = take_mask(MASK, columns)
    documents = document_lengths(columns, lengths, start, mask)
    if documents is not None:
        if undivided:
            index = next(index for index, sizes in enumerate(documents) if len(sizes) > 1)
            raise ValueError(
                f"example {index} is {len(documents[index])} documents, packed by another tool, "
                f"and {undivided}: give the documents one by one, and let fastft.pack pack them"
            )
        columns = cut_documents(columns, lengths, documents)
        ends = [0, *itertools.accumulate(counts)]
        counts = [sum(map(len, documents[begin:end])) for begin, end in itertools.pairwise(ends)]
        lengths = [*itertools.chain(*documents)]
    for key in KEYS & columns.keys():
        del columns[key]
    return columns, drop_masked(MASK, mask, columns, lengths), counts


def document_lengths(
    columns: Columns, lengths: Sequence[int], start: int | None = None, masks: Tensor | None = None
) -> list[list[int]] | None:
    """Finds the documents of each example, their tokens; None if every example is one document.

    Args:
        columns: of the examples; what is per token must be so. Without one of the keys above the
            answer is None.
        lengths: tokens of each example.
        start: a position at which documents may begin besides 0; None: all of an example begin
            alike, wherever.
        masks: the attention masks of all examples, (T,), or None if nothing is masked.

    Raises:
        ValueError: positions are no count from where documents begin; lengths or borders are not
            those of the example.
    """
    given = columns.keys() & KEYS
    numbered = masks is not None and bool((masks > 1).any())
    if not given and not numbered:
        return None
    rows = torch.repeat_interleave(torch.tensor(lengths))
    kept = torch.arange(rows.numel()) if masks is None else masks.nonzero().squeeze(1)
    numbers = [_numbers(key, columns[key], lengths) for key in LIST_KEYS if key in given]
    if NUMBERS in given:
        numbers.append(flatten_integers(NUMBERS, columns[NUMBERS]))
    if numbered:
        numbers.append(masks)  # type: ignore[arg-type]
    changed = rows[kept].diff() != 0
    inner = torch.zeros_like(changed)
    for number in numbers:
        inner |= number[kept].diff() != 0
    if POSITIONS in given:
        positions = flatten_integers(POSITIONS, columns[POSITIONS])[kept]
        inner |= positions.diff() != 1
        _check_positions(positions, inner | changed, kept, rows, lengths, start)
    inner &= ~changed
    if not inner.any():
        return None
    firsts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    begins = torch.cat([firsts, kept[1:][inner]]).sort().values
    sizes = iter(torch.cat([begins, torch.tensor([rows.numel()])]).diff().tolist())
    counts = torch.bincount(rows[begins], minlength=len(lengths)).tolist()
    return [list(itertools.islice(sizes, count)) for count in counts]


def _numbers(key: str, values: Column, lengths: Sequence[int]) -> Tensor:
    """Numbers the document of each token, (T,), by their lengths or borders in `values`."""
    made = []
    for index, (value, length) in enumerate(zip(values, lengths, strict=True)):
        listed = (
            flatten_integers(key, [value])
            if hasattr(value, "__len__") and len(value)
            else torch.zeros(1).long()
        )
        sizes = listed if key == SIZES else listed.diff()
        if (
            (key != SIZES and int(listed[0]))
            or bool((sizes < 0).any())
            or int(sizes.sum()) != length
        ):
            what = "the lengths" if key == SIZES else "the borders, from 0,"
            raise ValueError(
                f"{key} of example {index} must be {what} of its documents, {length} tokens in "
                f"all, got {listed.tolist()}"
            )
        made.append(torch.repeat_interleave(sizes))
    return torch.cat(made)


def _check_positions(
    positions: Tensor,
    begun: Tensor,
    kept: Tensor,
    rows: Tensor,
    lengths: Sequence[int],
    start: int | None,
) -> None:
    """Raises ValueError where a document begins at a position at which none may."""
    if positions.numel() == 0:
        return
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), begun.nonzero().squeeze(1) + 1])
    found, row = positions[begins], rows[kept[begins]]
    if start is None:
        first = torch.cat([torch.ones(1, dtype=torch.bool), row.diff() != 0])
        wrong = found != found[first][first.cumsum(0) - 1]
    else:
        wrong = (found != 0) & (found != start)
    if not wrong.any():
        return
    place = int(wrong.nonzero()[0])
    example, token = int(row[place]), int(kept[begins[place]])
    offset = token - sum(lengths[:example])
    before = int(positions[begins[place] - 1]) if begins[place] and offset else None
    came = (
        f"begin at {found[place]}"
        if before is None
        else f"are {found[place]} after {before} at token {offset}"
    )
    where = "0" if not start else f"0 or position_ids_start={start}"
    raise ValueError(
        f"position_ids of example {example} {came}; the collator numbers the tokens of each "
        f"document anew, so that positions must begin at {where} and go up by one: take the column "
        "out if they do not matter (RoBERTa-like models: position_ids_start=2), or pad instead of "
        "packing if they do"
    )


def documents_of(columns: Columns, lengths: Sequence[int]) -> list[list[int]]:
    """Finds the documents of each example, their tokens, in columns of which nothing is checked."""
    masks = columns.get(MASK)
    per_token = masks is not None and all(map(is_per_token, masks, lengths))
    flat = flatten_integers(MASK, columns[MASK]) if per_token else None
    return document_lengths(columns, lengths, masks=flat) or [[length] for length in lengths]


def cut_documents(columns: Columns, lengths: Sequence[int], documents: list[list[int]]) -> Columns:
    """Makes an example of each document. Of what says where they begin, `position_ids` alone stay.

    Raises:
        ValueError: an example of several documents has labels that are not per token.
    """
    cut: Columns = {}
    for key, values in columns.items():
        if key in KEYS and key != POSITIONS:
            continue
        made = cut[key] = list[Any]()
        for index, (value, length, sizes) in enumerate(
            zip(values, lengths, documents, strict=True)
        ):
            if len(sizes) == 1:
                made.append(value)
            elif holds_images(key, value):
                raise ValueError(
                    f"example {index} is {len(sizes)} documents, packed by another tool, of which "
                    f"nothing says whose {key} are whose: give the documents one by one"
                )
            elif is_per_token(value, length):
                ends = itertools.accumulate(sizes)
                made += [value[end - size : end] for end, size in zip(ends, sizes, strict=True)]
            elif key in LABEL_KEYS:
                raise ValueError(
                    f"example {index} is {len(sizes)} documents, packed by another tool, but has "
                    f"no label for each token: its {key} cannot be shared out; give the documents "
                    "one by one"
                )
            else:
                made += [value] * len(sizes)
    return cut


def is_per_token(value: Any, tokens: int) -> bool:
    """Tells whether `value` has as many elements as an example has tokens."""
    return hasattr(value, "__len__") and not isinstance(value, str | dict) and len(value) == tokens


def shortened(example: dict[str, Any], begin: int, length: int) -> dict[str, Any]:
    """Writes the columns that say where documents begin anew for a part of an example.

    The part is `length` tokens from `begin`. A document of which the first tokens are missing is
    one of its own, which begins where the part does.
    """
    columns: Columns = {key: [value] for key, value in example.items()}
    sizes = documents_of(columns, [len(example["input_ids"])])[0]
    ends = list(itertools.accumulate(sizes))
    overlaps = [
        min(end, begin + length) - max(end - size, begin)
        for end, size in zip(ends, sizes, strict=True)
    ]
    left = [overlap for overlap in overlaps if overlap > 0]
    made: dict[str, Any] = {
        **{key: [0, *itertools.accumulate(left)] for key in BORDERS},
        POSITIONS: [place for size in left for place in range(size)],
        NUMBERS: [number for number, size in enumerate(left) for _ in range(size)],
        SIZES: left,
    }
    return {key: made[key] for key in KEYS & columns.keys()}
