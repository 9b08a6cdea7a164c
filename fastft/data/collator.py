"""One packed batch out of a list of examples, with every boundary that attention kernels read.

Examples are checked and laid out as columns (`columns.py`), put into rows (`rows.py`), labelled by
the task (`masking.py`, `seq2seq.py`), and the boundaries filled in (`boundaries.py`, `batch.py`).
There is never a 2-D attention
mask: in transformers one disables the detection of packed sequences, and so does a cache (hence
    `use_cache`: False).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastft.data.batch import Expansion, FlatBatch, PackedBatch, count_labels
from fastft.data.boundaries import BOUNDARIES
from fastft.data.columns import (
    check_lengths,
    drop_masked,
    flatten,
    flatten_integers,
    integers_of,
    lengths_of,
    take_mask,
)
from fastft.data.documents import KEYS, LIST_KEYS, Columns, cut_documents, document_lengths
from fastft.data.features import columns_of
from fastft.data.keys import IGNORE_INDEX, LABEL_KEYS, RESERVED
from fastft.data.masking import TokenMasking
from fastft.data.pack import is_pack
from fastft.data.rows import Layout, balanced_rows, lay_out, width_of
from fastft.data.segment_labels import take_labels
from fastft.data.seq2seq import decoder_batch, decoder_columns, lay_out_both, take_decoder
from fastft.foreign import base_model
from fastft.ops import check_impl

TOKEN_KEYS = ("input_ids", "labels")
TASKS = ("causal_lm", "masked_lm", "token_classification", "sequence_classification", "seq2seq")


def _check_slices_logits(model: Any) -> None:
    """Raises ValueError where a mask of the logits to keep would not be understood; `model` may be
    just True."""
    import transformers

    if model is not True and not isinstance(model, torch.nn.Module):
        raise ValueError(f"supervised_only must be True, False or a model, got {model!r}")
    if not hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
        raise ValueError(
            f"supervised_only needs transformers >= 5.23, {transformers.__version__} is installed"
        )
    if model is True:
        return
    base = base_model(model)
    if "slice_logits_to_keep" not in inspect.unwrap(type(base).forward).__code__.co_names:
        raise ValueError(
            f"supervised_only: {type(base).__name__} does not use transformers' "
            f"slice_logits_to_keep"
        )


def _supervised(labels: Tensor) -> dict[str, Tensor]:
    """What makes a causal model compute logits for the tokens alone whose successor has a label."""
    following = torch.full_like(labels, IGNORE_INDEX)
    # the last token of a row is followed by an ignored one
    following.view(-1)[:-1] = labels.view(-1)[1:]
    keep = following != IGNORE_INDEX
    return {"logits_to_keep": keep, "shift_labels": following[keep]}


class PackingCollator:
    """A list of examples, or of packs from `fastft.pack`, becomes one packed batch. For
    `Trainer(data_collator=...)`.

    An example is a dict with `input_ids` (list, array or tensor of n > 0 integers), optionally
    `attention_mask` (tokens that it masks are removed) and labels as the task has them. Other keys
    with n numbers are kept; text and single numbers are left out. An example that is several
    documents, packed by another tool, is cut into them, each of which is an example from then on:
    where `position_ids` begin anew, `seq_idx` or a numbering `attention_mask` changes, or as
    `seq_lengths`, `cu_seq_lens` (`_q`, `_k`), `cu_seqlens` say. A feature may also be a row or more
    of an Arrow table. The batch is a `PackedBatch`, a dict. For R rows of T tokens, in all S
    segments, which are the examples and the padding of each row:

    | key | value |
    |---|---|
    | `input_ids`, `position_ids` | int64 (R, T) |
    | `labels` | int64 (R, T); by the task |
    | `seq_idx` | int32 (R, T), the segment of each token |
    | `cu_seq_lens_q`, `cu_seq_lens_k` | int32 (S + 1,), where segments begin in the R * T tokens, and R * T |
    | `max_length_q`, `max_length_k` | int, the longest segment |
    | `padding_lengths` | int32 (R,), padding at the end of each row, if there is any (not for `seq2seq`) |
    | `use_cache` | False |
    | other keys | int64 or the array's floating-point dtype (float32 from lists), (R, T) |

    What labels are depends on the task:

    - `causal_lm`: n in an example, else its input_ids. The model shifts them: each example's first
      one is ignored.
    - `token_classification`: n in an example, all kept; without them the batch has none.
    - `masked_lm`: drawn as transformers' `DataCollatorForLanguageModeling` does it, which changes
      input_ids; without `tokenizer` the examples are masked already and have n labels, all kept.
    - `sequence_classification`: a number, or C of them, as `labels` or `label`. The batch's are
      (E,) or (E, C) for E examples in the order in which they came, int64 or float32;
      `label_segments`, int64 (E,), are their segments. The model needs `fastft.pool_segments`.
    - `seq2seq`: m in an example. The batch's are (R, U), with `decoder_input_ids` int64 (R, U),
      `decoder_cu_seq_lens` int32 (S + 1,), `decoder_max_length` int; all other keys are the
      encoder's. For models with `attn_implementation="fastft"`, which keeps decoder, encoder and
      what is between them apart by these boundaries.

    With `supervised_only` there are also `logits_to_keep`, bool (R, T), whether the token after has
    a label, and `shift_labels`, int64 (K,), these labels: the model computes hidden states for all
    tokens, but logits for K alone; the loss is the same. Its logits are then (K, V): evaluate with
    `prediction_loss_only=True`, and leave label smoothing and `compute_loss_func` alone, which
    expect (R, T, V).

    Args:
        task: what the labels are; see above.
        rows: rows of the batch, fewer where there are fewer examples. Examples are spread so that
            rows are about equally long; a pack stays whole. Each row that is shorter than the
            longest ends with padding.
        pad_to_multiple_of: T (and U) is rounded up to a multiple; padding is a segment, labels
            -100, other keys 0.
        position_ids_start: position of an example's first token; RoBERTa-like models need 2.
        pad_token_id: the token used for padding.
        supervised_only: False; True; or the model that the batches are for, which is then checked.
            Needs transformers 5.23 and a causal model that uses its `slice_logits_to_keep`.
        tokenizer: for `masked_lm`: its mask token, vocabulary and special tokens (unless the
            examples have a `special_tokens_mask`).
        mlm_probability: share of the tokens that `masked_lm` masks.
        seed: of the masks; None draws from torch's global generator.
        decoder_start_token_id: for `seq2seq`, from the model's config; not needed if examples have
            decoder_input_ids.
        expand_on_device: returns a `FlatBatch`, whose `.to(device)`, called by accelerate and so by
            Trainer, makes one copy of all integers and computes positions, segments, boundaries and
            ignored labels there.
        pad_examples: examples that are in no `Pack` are padded instead, a row for each and an
            `attention_mask`, in a plain dict, as transformers' collators do it: training on
            `fastft.pack(...)` and evaluation on the dataset itself, or generation, then share a
            collator. `pad_token_id` must be the model's.
        impl: `"auto"`, `"cpp"`, `"cuda"`, `"triton"` or `"eager"`; the GPU's with
            `expand_on_device`.

    Raises:
        ValueError: an argument out of its range; `supervised_only` where transformers or the model
            lacks it; in a call, no examples, input_ids missing or empty, keys that differ between
            examples, a key that has not one number per token, or the name of one of the batch's
            own, labels that the task needs and the examples lack, positions that do not count from
            where a document begins (0 or `position_ids_start`), several documents where a task has
            labels for none of them, more tokens than int32 counts.
        TypeError: in a call, a feature that is neither a dict nor a pack.
        RuntimeError: the engine asked for is not available.
    """

    def __init__(
        self,
        *,
        task: str = "causal_lm",
        rows: int = 1,
        pad_to_multiple_of: int | None = None,
        position_ids_start: int = 0,
        pad_token_id: int = 0,
        supervised_only: Any = False,
        tokenizer: Any = None,
        mlm_probability: float = 0.15,
        seed: int | None = None,
        decoder_start_token_id: int | None = None,
        expand_on_device: bool = False,
        pad_examples: bool = False,
        impl: str = "auto",
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(map(repr, TASKS))}, got {task!r}")
        for name, value in (("rows", rows), ("pad_to_multiple_of", pad_to_multiple_of)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                if name == "rows" or value is not None:
                    raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, value in (
            ("position_ids_start", position_ids_start),
            ("pad_token_id", pad_token_id),
        ):
            if not hasattr(value, "__index__") or value < 0:
                raise ValueError(f"{name} must be an integer from 0 on, got {value!r}")
        if supervised_only is not False:
            if task != "causal_lm" or expand_on_device:
                other = (
                    "expand_on_device, as labels are chosen on the host"
                    if expand_on_device
                    else f"task {task!r}"
                )
                raise ValueError(f"supervised_only does not go with {other}")
            _check_slices_logits(supervised_only)
        if not expand_on_device:
            BOUNDARIES.resolve(impl, torch.device("cpu"))
        else:
            check_impl(impl)
        self.task, self.rows, self.pad_token_id = task, rows, pad_token_id
        self.pad_to_multiple_of, self.position_ids_start = pad_to_multiple_of, position_ids_start
        self.supervised_only, self.expand_on_device, self.impl = (
            supervised_only is not False,
            expand_on_device,
            impl,
        )
        self.decoder_start_token_id, self.pad_examples = decoder_start_token_id, pad_examples
        self.masking = None if tokenizer is None else TokenMasking(tokenizer, mlm_probability, seed)

    def __call__(self, features: Iterable[Any]) -> PackedBatch | FlatBatch:
        """The batch of `features`; see the class."""
        features = list(features)
        of_segments = self.task == "sequence_classification"
        columns, counts = columns_of(features, LABEL_KEYS if of_segments else ("labels",))
        self._refuse_reserved(columns)
        labels = take_labels(columns) if of_segments else None
        decoder, decoder_lengths = take_decoder(columns) if self.task == "seq2seq" else ({}, [])
        columns, lengths, counts = self._documents(columns, counts)
        if self.pad_examples and not any(map(is_pack, features)):
            return self._padded(
                columns,
                lengths,
                None if labels is None else labels.values,
                decoder,
                decoder_lengths,
            )
        rows = self._rows(counts, lengths, decoder_lengths)
        multiple = self.pad_to_multiple_of or 1
        integers: dict[str, Tensor] = {}
        others: dict[str, Any] = {}
        if decoder:
            layout, decoder_layout = lay_out_both(lengths, decoder_lengths, rows, multiple)
            integers, others = decoder_batch(
                decoder, decoder_layout, self.decoder_start_token_id, self.pad_token_id
            )
        else:
            layout = lay_out(lengths, rows, width_of(lengths, rows, multiple))
        flat = self._flatten(columns, layout)
        if labels is not None:
            flat |= labels.arranged(layout)
        return self._finish({**flat, **integers}, others, layout)

    def _padded(
        self,
        columns: Columns,
        lengths: list[int],
        labels: Tensor | None,
        decoder: Columns,
        decoder_lengths: list[int],
    ) -> PackedBatch:
        """The batch that transformers' padding collators make: a row for each example, and an
        attention_mask."""
        rows = [[row] for row in range(len(lengths))]
        multiple = self.pad_to_multiple_of or 1
        layout = lay_out(lengths, rows, width_of(lengths, rows, multiple))
        batch: dict[str, Any] = self._flatten(columns, layout)
        real = torch.arange(layout.width) < torch.tensor(lengths)[:, None]
        if decoder:
            width = width_of(decoder_lengths, rows, multiple)
            batch |= decoder_columns(
                decoder, lay_out(decoder_lengths, rows, width), self.pad_token_id
            )
        elif labels is not None:
            batch["labels"] = labels
        elif self.task == "causal_lm" and "labels" not in batch:
            batch["labels"] = batch["input_ids"].masked_fill(~real, IGNORE_INDEX)
        padded = PackedBatch(batch, attention_mask=real.long())
        if "labels" in padded:
            padded.count = functools.partial(count_labels, padded["labels"], [], [])
        return padded

    def _refuse_reserved(self, columns: Columns) -> None:
        made = (*RESERVED, "logits_to_keep", "shift_labels") if self.supervised_only else RESERVED
        for key in made:
            if key in columns:
                raise ValueError(
                    f"the examples have a column {key!r}, which the collator makes itself: rename "
                    f"it"
                )

    def _documents(
        self, columns: Columns, counts: list[int]
    ) -> tuple[Columns, list[int], list[int]]:
        """The checked columns without what is masked, rows that another tool packed cut into their
        documents.

        With them come the tokens of each example, and how many examples each feature is.
        """
        lengths = lengths_of("input_ids", columns["input_ids"])
        for key, values in columns.items():
            if key != "input_ids" and key not in LIST_KEYS:
                check_lengths(key, values, lengths, "input_ids")
        mask = take_mask("attention_mask", columns)
        documents = document_lengths(columns, lengths, self.position_ids_start, mask)
        if documents is not None:
            self._refuse_documents(documents)
            columns = cut_documents(columns, lengths, documents)
            ends = [0, *itertools.accumulate(counts)]
            counts = [
                sum(map(len, documents[begin:end])) for begin, end in itertools.pairwise(ends)
            ]
            lengths = [*itertools.chain(*documents)]
        for key in KEYS & columns.keys():
            del columns[key]
        return columns, drop_masked("attention_mask", mask, columns, list(columns), lengths), counts

    def _refuse_documents(self, documents: list[list[int]]) -> None:
        """Raises ValueError where an example must not be several documents."""
        what = {
            "sequence_classification": "task 'sequence_classification' has no label for each",
            "seq2seq": "task 'seq2seq' does not know which labels are whose",
        }.get(self.task, "with pad_examples each would see the others" if self.pad_examples else "")
        if what:
            index = next(index for index, sizes in enumerate(documents) if len(sizes) > 1)
            raise ValueError(
                f"example {index} is {len(documents[index])} documents, packed by another tool, "
                f"and {what}: give the "
                "documents one by one, and let fastft.pack pack them"
            )

    def _rows(
        self, counts: list[int], lengths: list[int], decoder_lengths: list[int]
    ) -> list[list[int]]:
        """The examples of each row; `counts` are those which must stay in one."""
        if self.rows == 1:
            return [list(range(len(lengths)))]
        starts = [0, *itertools.accumulate(counts)]
        members = [range(begin, end) for begin, end in itertools.pairwise(starts)]
        tokens = [
            sum(pair) for pair in itertools.zip_longest(lengths, decoder_lengths, fillvalue=0)
        ]
        sizes = [sum(tokens[example] for example in unit) for unit in members]
        return [
            [example for unit in row for example in members[unit]]
            for row in balanced_rows(sizes, self.rows)
        ]

    def _flatten(self, columns: dict[str, list[Any]], layout: Layout) -> dict[str, Tensor]:
        """The columns as the segments lie, (R, T); those of the task checked or drawn."""
        masking = self.masking if self.task == "masked_lm" else None
        if masking is not None:
            columns.pop("labels", None)
            if "special_tokens_mask" not in columns:
                columns["special_tokens_mask"] = [
                    *map(masking.special_tokens, columns["input_ids"])
                ]
        elif self.task == "masked_lm" and "labels" not in columns:
            raise ValueError(
                "task 'masked_lm' needs tokenizer, or examples that have labels already"
            )
        fills = {
            "input_ids": self.pad_token_id,
            "labels": IGNORE_INDEX,
            "special_tokens_mask": int(masking is not None),
        }
        flat = {
            key: (flatten_integers if key in TOKEN_KEYS else flatten)(
                key, layout.arrange(values, fills.get(key, 0))
            )
            for key, values in columns.items()
        }
        if masking is not None:
            flat["labels"] = masking(flat["input_ids"], flat.pop("special_tokens_mask"))
        return {key: tensor.view(layout.rows, layout.width) for key, tensor in flat.items()}

    def _finish(
        self, flat: dict[str, Tensor], others: dict[str, Any], layout: Layout
    ) -> PackedBatch | FlatBatch:
        """The batch of its columns."""
        shifts, of_tokens = (
            self.task == "causal_lm",
            self.task not in ("sequence_classification", "seq2seq"),
        )
        pairs = zip(layout.order, layout.lengths, strict=True)
        ignored = [length if example is None else int(shifts) for example, length in pairs]
        source = "labels" if of_tokens and "labels" in flat else "input_ids" if shifts else None
        integers = {key: tensor for key, tensor in flat.items() if not tensor.is_floating_point()}
        segments = integers_of(layout.lengths), integers_of(ignored)
        longest = max(layout.lengths)
        others |= {"max_length_q": longest, "max_length_k": longest, "use_cache": False}
        others |= {key: tensor for key, tensor in flat.items() if key not in integers}
        if self.task != "seq2seq" and any(layout.padding):
            others["padding_lengths"] = torch.tensor(layout.padding, dtype=torch.int32)
        expansion = Expansion(source, self.position_ids_start, self.impl)
        batch: PackedBatch | FlatBatch
        if self.expand_on_device:
            batch = FlatBatch.of(*segments, integers, others, expansion)
        else:
            batch = expansion(*segments, integers, others)
            if self.supervised_only:
                batch |= _supervised(batch["labels"])
        if source is not None or "labels" in flat:
            batch.count = functools.partial(
                count_labels, flat.get("labels"), layout.lengths, ignored if of_tokens else []
            )
        return batch
