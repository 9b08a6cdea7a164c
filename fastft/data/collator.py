"""One packed batch out of a list of examples, with every boundary that attention kernels read.

    features.py    examples, packs and Arrow tables become columns
    tasks/         the task takes its labels out
    documents.py   rows that another tool packed are cut, masked tokens left out, lengths checked
    rows.py        examples are shared out over rows, and columns laid out as they lie there
    tasks/         the task adds its labels
    boundaries.py  positions, segments and borders follow: now, or on the device (batch.py)

There is never a 2-D attention mask: in transformers one disables the detection of packed sequences,
and so does a cache (hence `use_cache`: False).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastft.checks import boolean, integer, optional_integer
from fastft.data.batch import Expansion, FlatBatch, PackedBatch, count_labels
from fastft.data.boundaries import BOUNDARIES
from fastft.data.columns import integers_of
from fastft.data.documents import split_documents
from fastft.data.features import columns_of
from fastft.data.keys import (
    IGNORE_INDEX,
    LOGITS_TO_KEEP,
    MAX_LENGTH_K,
    MAX_LENGTH_Q,
    PADDING_LENGTHS,
    SHIFT_LABELS,
    USE_CACHE,
    refuse_reserved,
)
from fastft.data.multi_axis import positions_of
from fastft.data.pack import is_pack
from fastft.data.rows import Layout, balanced_rows, lay_out
from fastft.data.tasks.causal_lm import CausalLM, check_supervised, kept_logits
from fastft.data.tasks.image_text import ImageText
from fastft.data.tasks.masked_lm import MaskedLM, TokenMasking
from fastft.data.tasks.seq2seq import Seq2Seq
from fastft.data.tasks.sequence_classification import SequenceClassification
from fastft.data.tasks.speech_seq2seq import ROW_TOKENS, SpeechSeq2Seq, check_speech
from fastft.data.tasks.task import Task
from fastft.ops import check_impl

TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "token_classification": Task,
    "sequence_classification": SequenceClassification,
    "seq2seq": Seq2Seq,
    "speech_seq2seq": SpeechSeq2Seq,
    "image_text_to_text": ImageText,
}


class PackingCollator:
    """Makes one packed batch of examples, or of packs from `fastft.pack`.

    It goes into `Trainer(data_collator=...)`.

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
    | `cu_seq_lens_q`, `cu_seq_lens_k` | int32 (S + 1,), where segments begin; the last is R * T |
    | `max_length_q`, `max_length_k` | int, the longest segment |
    | `padding_lengths` | int32 (R,), padding at each row's end, if any (not for `seq2seq`) |
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
    - `speech_seq2seq`: m in an example, which has `input_features` or `input_values` in the place
      of input_ids. The encoder has a row for each of the E examples, padded with zeros where they
      differ, and `attention_mask` (E, L) then; the decoder has `labels`, `decoder_input_ids`,
      `decoder_position_ids` (R, U) in as few rows of at most `row_tokens` as hold the examples,
      `decoder_cu_seq_lens` int32 (E + 1,) and `decoder_max_length`. For Whisper and its kind.
    - `image_text_to_text`: n in an example, -100 at image tokens; the model shifts them. An example
      is what a processor gives of one text with its images, (1, n) as well: what it has of images
      (`pixel_values`, `image_grid_thw` and others, by their names) follows one another in the batch
      as the examples do. For a model whose positions have A axes (mRoPE: Qwen-VL, GLM-V) the
      collator needs `model`; `position_ids` are then (1 + A, R, T).

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
        position_ids_start: position of an example's first token, below 2^31; RoBERTa-like models
            need 2.
        pad_token_id: the token used for padding.
        supervised_only: False; True; or the model that the batches are for, which is then checked.
            Needs transformers 5.23 and a causal model that uses its `slice_logits_to_keep`.
        tokenizer: for `masked_lm`: its mask token, vocabulary and special tokens (unless the
            examples have a `special_tokens_mask`).
        mlm_probability: share of the tokens that `masked_lm` masks.
        seed: of the masks, in [0, 2^63); None draws from torch's global generator.
        decoder_start_token_id: for `seq2seq` and `speech_seq2seq`, from the model's config; not
            needed if examples have decoder_input_ids.
        row_tokens: for `speech_seq2seq`: tokens of a decoder's row, at most, or one example.
            Whisper takes no more than 448, the default, its `config.max_target_positions`.
        model: for `image_text_to_text`: the model that the batches are for. Its `get_rope_index`,
            if it has one, makes the positions of each example; no weight of it is kept.
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
            own, labels that the task needs and the examples lack, images of several sizes of
            which nothing says what is real, positions that do not count from
            where a document begins (0 or `position_ids_start`), several documents where a task has
            labels for none of them, more tokens than int32 counts.
        TypeError: `model` is no module, an option no bool; in a call, a feature that is neither a
            dict nor a pack.
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
        row_tokens: int = ROW_TOKENS,
        model: Any = None,
        expand_on_device: bool = False,
        pad_examples: bool = False,
        impl: str = "auto",
    ) -> None:
        if not isinstance(task, str) or task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(map(repr, TASKS))}, got {task!r}")
        self.task, self.rows = task, integer("rows", rows)
        self.pad_to_multiple_of = optional_integer("pad_to_multiple_of", pad_to_multiple_of)
        self.position_ids_start = integer(
            "position_ids_start", position_ids_start, least=0, bits=31
        )
        self.pad_token_id = integer("pad_token_id", pad_token_id, least=0)
        self.decoder_start_token_id = optional_integer(
            "decoder_start_token_id", decoder_start_token_id, least=0
        )
        self.pad_examples = boolean("pad_examples", pad_examples)
        seed = optional_integer("seed", seed, least=0)
        self.supervised_only = supervised_only is not False
        if self.supervised_only:
            check_supervised(supervised_only, task, expand_on_device)
        self.row_tokens = integer("row_tokens", row_tokens)
        if task == "speech_seq2seq":
            check_speech(rows, expand_on_device)
        if boolean("expand_on_device", expand_on_device):
            check_impl(impl)
        else:
            BOUNDARIES.resolve(impl, torch.device("cpu"))
        self.expand_on_device, self.impl = expand_on_device, impl
        if model is not None and task != "image_text_to_text":
            raise ValueError(f"model is for task 'image_text_to_text', task is {task!r}")
        self.positions = None if model is None else positions_of(model)
        self.masking = None if tokenizer is None else TokenMasking(tokenizer, mlm_probability, seed)

    def __call__(self, features: Iterable[Any]) -> PackedBatch | FlatBatch:
        """Collates `features`; see the class."""
        return self.collate(list(features))

    def collate(self, features: list[Any]) -> PackedBatch | FlatBatch:
        """Does so; the probe stands in its place to see what comes here."""
        task = TASKS[self.task](self)
        if isinstance(task, SpeechSeq2Seq):
            return task.batch(features)
        columns, counts = columns_of(features, task.label_keys)
        refuse_reserved(columns, (LOGITS_TO_KEEP, SHIFT_LABELS) if self.supervised_only else ())
        task.take(columns)
        alone = "with pad_examples each would see the others" if self.pad_examples else ""
        columns, lengths, counts = split_documents(
            columns, counts, self.position_ids_start, task.undivided or alone
        )
        multiple = self.pad_to_multiple_of or 1
        if self.pad_examples and not any(map(is_pack, features)):
            layout = lay_out(lengths, [[example] for example in range(len(lengths))], multiple)
            return _padded(task, task.fill(columns, layout), layout, lengths)
        layout = lay_out(lengths, self._rows(counts, lengths, task), multiple, task.beside)
        batch = task.fill(columns, layout)
        task.finish(batch, layout)
        return self._packed(task, batch, layout)

    def _rows(self, counts: list[int], lengths: list[int], task: Task) -> Sequence[Sequence[int]]:
        """Shares the examples out over rows; `counts` are those which must stay in one."""
        if self.rows == 1:
            return [range(len(lengths))]
        starts = itertools.accumulate(counts, initial=0)
        members = [range(begin, end) for begin, end in itertools.pairwise(starts)]
        tokens = [*map(sum, itertools.zip_longest(lengths, task.beside, fillvalue=0))]
        sizes = [sum(tokens[example] for example in unit) for unit in members]
        return [
            [example for unit in row for example in members[unit]]
            for row in balanced_rows(sizes, self.rows)
        ]

    def _packed(self, task: Task, batch: dict[str, Any], layout: Layout) -> PackedBatch | FlatBatch:
        """Adds what follows from the segments, or leaves that to the device."""
        source = task.source(batch)
        integers = {
            key: value for key, value in batch.items() if getattr(value, "dtype", 0) == torch.int64
        }
        longest = max(layout.lengths)
        others: dict[str, Any] = {MAX_LENGTH_Q: longest, MAX_LENGTH_K: longest, USE_CACHE: False}
        others |= {key: value for key, value in batch.items() if key not in integers}
        # two sides have each their own padding, so that no one number is a row's
        if not task.beside and any(layout.padding):
            others[PADDING_LENGTHS] = torch.tensor(layout.padding, dtype=torch.int32)
        ignored = [
            length if example is None else task.ignored
            for example, length in zip(layout.order, layout.lengths, strict=True)
        ]
        segments = integers_of(layout.lengths), integers_of(ignored)
        expansion = Expansion(source, self.position_ids_start, self.impl)
        made: PackedBatch | FlatBatch
        if self.expand_on_device:
            made = FlatBatch.of(*segments, integers, others, expansion)
        else:
            made = expansion(*segments, integers, others)
            if self.supervised_only:
                made |= kept_logits(made["labels"])
        if source is not None or "labels" in batch:
            made.count = functools.partial(
                count_labels, batch.get("labels"), layout.lengths, ignored if source else []
            )
        return made


def _padded(task: Task, batch: dict[str, Any], layout: Layout, lengths: list[int]) -> PackedBatch:
    """Makes the batch of transformers' padding collators: a row for each example, and an
    attention_mask."""
    real = torch.arange(layout.width) < torch.tensor(lengths)[:, None]
    if task.source(batch) == "input_ids":
        batch["labels"] = batch["input_ids"].masked_fill(~real, IGNORE_INDEX)
    padded = PackedBatch(batch, attention_mask=real.long())
    if "labels" in padded:
        padded.count = functools.partial(count_labels, padded["labels"], [], [])
    return padded
