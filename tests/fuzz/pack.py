"""pack of a dataset: every token once, whatever the dataset is; a seed draws the same from all.

Token t of example i is the number 1000 i + t, so that a pack says by itself what is in it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from support.packed_examples import best_fit_decreasing, parts_of_example
from torch.utils.data import ConcatDataset, Dataset, Subset

import fastft

EXAMPLES = 100
IGNORED = -100
SENTENCE = 3  # tokens of a document, where a row is several
PROCESSED = "batches of one"
Row = dict[str, Any]


class Map(Dataset[Row]):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class Fetching(Map):
    """Which would rather give many rows at once."""

    def __getitems__(self, indices: list[int]) -> list[Row]:
        return [self.rows[index] for index in indices]


def each_value(make: Callable[[Any], Any]) -> Callable[[list[Row]], list[Row]]:
    """Rows whose lists are something else."""
    return lambda rows: [
        {key: make(value) if isinstance(value, list) else value for key, value in row.items()}
        for row in rows
    ]


def _made_of(rows: list[Row]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def _shuffled(rows: list[Row]) -> datasets.Dataset:
    """Indices of indices, in the order of the rows again."""
    drawn = _made_of(rows).shuffle(seed=3)
    return drawn.select(np.argsort(drawn["row"]))


def _chunks(rows: list[Row]) -> datasets.Dataset:
    middle = len(rows) // 2
    return datasets.concatenate_datasets(
        [_made_of(part) for part in (rows[:middle], rows[middle:]) if part]
    )


def _transformed(rows: list[Row]) -> datasets.Dataset:
    """Tokens that are made when they are asked for, and their number that is stored."""
    stored = _made_of([row | {"length": len(row["input_ids"])} for row in rows])
    stored.set_transform(dict)
    return stored


FORMS: dict[str, Callable[[list[Row]], Any]] = {
    "list": list,
    "tuple": tuple,
    "map": Map,
    "fetching": Fetching,
    "tuples": each_value(tuple),
    "tensors": each_value(torch.tensor),
    "int32": each_value(lambda value: torch.tensor(value, dtype=torch.int32)),
    "arrays": each_value(np.array),
    PROCESSED: each_value(lambda value: torch.tensor(value)[None]),
    "subset": lambda rows: Subset(Map(rows[::-1]), range(len(rows) - 1, -1, -1)),
    "joined": lambda rows: ConcatDataset([Map(rows[:1]), rows[1:]] if rows[1:] else [Map(rows)]),
    "datasets": _made_of,
    "numpy": lambda rows: _made_of(rows).with_format("numpy"),
    "torch": lambda rows: _made_of(rows).with_format("torch"),
    "arrow": lambda rows: _made_of(rows).with_format("arrow"),
    "some columns": lambda rows: _made_of(rows).with_format(
        "torch", columns=["input_ids"], output_all_columns=True
    ),
    "part": lambda rows: _made_of([rows[-1], *rows, rows[0]]).select(range(1, len(rows) + 1)),
    "shuffled": _shuffled,
    "chunks": _chunks,
    "chosen chunks": lambda rows: _chunks(rows[::-1]).select(range(len(rows) - 1, -1, -1)),
    "large": lambda rows: _made_of(rows).cast_column(
        "input_ids", datasets.LargeList(datasets.Value("int32"))
    ),
    "transform": _transformed,
}


class Case(NamedTuple):
    form: str
    lengths: list[int]
    max_tokens: int
    overlong: str
    max_sequences: int | None
    window: int | None
    balance: int | None
    seed: int | None
    epochs: list[int]
    labels: str | None
    documents: bool
    masked: int
    said: bool  # a column says the length
    travels: str
    indices: list[int]


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    max_tokens = draw(st.sampled_from([1, 2, 7, 31, 64]))
    longest = draw(st.sampled_from([max_tokens, max_tokens, 3 * max_tokens]))
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=30))
    if draw(st.integers(0, 30)) == 30:
        lengths.append(0)
    form, balance = draw(st.sampled_from(sorted(FORMS))), draw(st.none() | st.integers(1, 9))
    documents = form != PROCESSED and draw(st.booleans())
    return Case(
        form,
        lengths,
        max_tokens,
        draw(st.sampled_from(["error", "truncate", "split", "drop"])),
        draw(st.none() | st.integers(1, 6)),
        draw(st.none() | st.integers(1, 40)),
        balance,
        draw(st.none() | st.integers(0, 2**40)),
        draw(st.lists(st.integers(0, 3), max_size=3)),
        draw(st.sampled_from(["tokens", *["whole"] * (not documents), *[None] * (not balance)])),
        documents,
        0 if documents else draw(st.sampled_from([0, 0, 2, 5])),  # positions would have gaps
        draw(st.booleans()),
        draw(st.sampled_from(["no", "pickle", "copy"])),
        draw(st.lists(st.integers(-40, 39), max_size=5)),
    )


CASES = _cases()


def check(case: Case) -> None:
    rows = [_row(case, example, length) for example, length in enumerate(case.lengths)]
    if _is_refused(case):
        with pytest.raises(ValueError, match=r"example|leaves nothing"):
            _packed(case, case.form, rows)
        return
    ours, other = (_packed(case, form, rows) for form in (case.form, "list"))
    first = _contents(ours)
    assert first == _contents(other), "another form of the dataset makes other packs"
    for epoch in case.epochs:
        ours = {"no": lambda x: x, "pickle": _pickled, "copy": copy.deepcopy}[case.travels](ours)
        for packed in (ours, other):
            packed.set_epoch(epoch)
        found = _contents(ours)
        assert found == _contents(other), "another form draws other packs"
        assert (case.seed is None and case.balance is None) <= (found == first)
        assert (epoch == 0) <= (found == first), "epoch 0 is not what it was"
        _check_packs(case, rows, found)
    _check_packs(case, rows, first)
    ours.set_epoch(0)
    _check_access(case, ours, first)
    # a row has no label of an example, and a processor's batch is no row
    if case.labels != "whole" and case.form != PROCESSED:
        _check_rows(ours, first)


def _row(case: Case, example: int, length: int) -> Row:
    tokens = [1000 * example + place for place in range(length)]
    row: Row = {"input_ids": tokens, "text": f"example {example}", "row": example}
    if case.labels is not None:
        row["labels"] = [-token for token in tokens] if case.labels == "tokens" else example
    if case.documents:
        row["position_ids"] = [place % SENTENCE for place in range(length)]
    if case.masked:  # every so many tokens, but never the first
        row["attention_mask"] = [int((place + 1) % case.masked != 0) for place in range(length)]
    return row | ({"n": length} if case.said else {})


def _is_refused(case: Case) -> bool:
    too_long = [length > case.max_tokens for length in case.lengths]
    nothing_left = case.overlong == "drop" and all(too_long)
    # of the first that is too long no piece may be of padding alone
    first = next((length for length in case.lengths if length > case.max_tokens), 0)
    mask = _row(case, 0, first).get("attention_mask", [1] * first)
    pieces = [mask[at : at + case.max_tokens] for at in range(0, first, case.max_tokens)]
    only_padding = case.overlong == "split" and not all(map(any, pieces))
    refused = 0 in case.lengths or nothing_left or only_padding
    return refused or (case.overlong == "error" and any(too_long))


def _packed(case: Case, form: str, rows: list[Row]) -> Any:
    return fastft.pack(
        FORMS[form](rows),
        case.max_tokens,
        overlong=case.overlong,
        max_sequences=case.max_sequences,
        window=case.window,
        balance=case.balance,
        seed=case.seed,
        length_column="n" if case.said else None,
    )


def _pickled(packed: Any) -> Any:
    return pickle.loads(pickle.dumps(packed))


def _plain(value: Any) -> Any:
    plain = value.tolist() if hasattr(value, "tolist") else value
    plain = list(plain) if isinstance(plain, tuple) else plain
    is_batch = isinstance(plain, list) and len(plain) == 1 and isinstance(plain[0], list)
    return plain[0] if is_batch else plain


def _contents(packed: Any) -> list[list[Row]]:
    return [_examples(packed[index]) for index in range(len(packed))]


def _examples(one: Any) -> list[Row]:
    """What a pack has, without what a transform wanted to know."""
    keys = one.keys() - {"length"}
    return [{key: _plain(example[key]) for key in keys} for example in one.examples]


def _pieces(case: Case) -> Iterator[tuple[int, int, int]]:
    """Example, first token and tokens of each part that is to be in a pack."""
    for example, length in enumerate(case.lengths):
        for part in parts_of_example(length, case.max_tokens, case.overlong):
            yield example, *part


def _is_filler(example: Row) -> bool:
    return example.get("labels") in ([IGNORED], IGNORED) and len(example["input_ids"]) == 1


def _check_packs(case: Case, rows: list[Row], packs: list[list[Row]]) -> None:
    found, windows, shapes = [], [], []
    fillers = [pack for pack in packs if len(pack) == 1 and _is_filler(pack[0])]
    for pack in packs:
        if pack in fillers:
            continue
        parts = _parts(case, rows, pack)
        assert sum(length for *_, length in parts) <= case.max_tokens, "a pack is too full"
        assert len(parts) <= (case.max_sequences or len(parts)), "a pack has too many sequences"
        of_pack = {example // (case.window or len(rows)) for example, *_ in parts}
        assert len(of_pack) == 1, "a pack has examples of several windows"
        windows += of_pack
        shapes.append(sorted(length for *_, length in parts))
        found += parts
    assert sorted(found) == [*_pieces(case)], "tokens are missing or twice"
    expected = _best_fit(case)
    if case.balance is None:
        assert windows == sorted(windows), "windows have changed places"
        assert not fillers
        assert sorted(zip(windows, shapes, strict=True)) == expected, "packs are not best fit's"
    else:
        assert len(packs) == -(-len(expected) // case.balance) * case.balance
        # as few packs as there can be, where one stays empty
        assert not fillers or len(packs) - case.balance < len(found)


def _best_fit(case: Case) -> list[tuple[int, list[int]]]:
    """The window of each pack of the textbook, and its parts' lengths, which no epoch changes."""
    size = case.window or len(case.lengths)
    packs = list[tuple[int, list[int]]]()
    for window in range(-(-len(case.lengths) // size)):
        lengths = [length for example, _, length in _pieces(case) if example // size == window]
        made = best_fit_decreasing(lengths, case.max_tokens, case.max_sequences)
        packs += [(window, sorted(lengths[part] for part in pack)) for pack in made]
    return sorted(packs)


def _parts(case: Case, rows: list[Row], pack: list[Row]) -> list[tuple[int, int, int]]:
    """What the examples of a pack are parts of; checks that all their keys are those parts'."""
    parts = list[tuple[int, int, int]]()
    for example in pack:
        number, start = divmod(example["input_ids"][0], 1000)
        length = len(example["input_ids"])
        whole = rows[number]
        for key in example.keys() - {"position_ids"}:
            value = whole[key]
            of_part = value[start : start + length] if isinstance(value, list) else value
            assert example[key] == of_part, f"{key} is another's"
        if not case.documents:
            parts.append((number, start, length))
            continue
        assert start % case.max_tokens == 0 or start % SENTENCE == 0, "a document begins elsewhere"
        assert length <= SENTENCE - start % SENTENCE, "two documents are one"
        assert example["position_ids"] == [*range(length)] or start % SENTENCE
        before, begun, so_far = parts[-1] if parts else (-1, 0, 0)
        if number == before and start == begun + so_far and start % case.max_tokens:
            parts[-1] = number, begun, so_far + length
        else:
            parts.append((number, start, length))
    return parts


def _check_access(case: Case, packed: Any, packs: list[list[Row]]) -> None:
    """Several packs at once are these packs, and one that does not exist is an IndexError."""
    inside = [index for index in case.indices if -len(packs) <= index < len(packs)]
    assert [*map(_examples, packed.__getitems__(inside))] == [packs[index] for index in inside]
    for index in (len(packs), -len(packs) - 1):
        with pytest.raises(IndexError):
            packed[index]


def _check_rows(packed: Any, packs: list[list[Row]]) -> None:
    """Copied, a pack is a row, without what is masked; a part of which nothing is left is named."""
    masks = [example.get("attention_mask", [1]) for pack in packs for example in pack]
    if not all(map(any, masks)):
        with pytest.raises(ValueError, match="attention_mask is all zeros"):
            packed.to_dataset()
        return
    rows = packed.to_dataset()
    assert len(rows) == len(packs)
    for row, pack in zip(rows, packs, strict=True):
        ids, sizes = list[int](), list[int]()
        for example in pack:
            mask = example.get("attention_mask", [1] * len(example["input_ids"]))
            kept = [token for token, real in zip(example["input_ids"], mask, strict=True) if real]
            ids, sizes = ids + kept, [*sizes, len(kept)]
        assert row["input_ids"] == ids and row["seq_lengths"] == sizes
        assert "text" not in row and "attention_mask" not in row
