"""The batches of another collator, packed: its tokens with its labels, without its padding.

The collator that is there makes its padded batch, so that whatever it does to labels (masking,
ignored prompts, an end token that is the padding token) is done. Each row without what its
attention_mask masks is an example again, and `PackingCollator` makes the packed batch of these:

    (N, L) ids, mask, labels    ->  N examples of their own lengths  ->  (1, T)

Packs of `fastft.pack` stay together, in one row. Which images of a batch are whose nobody but the
collator knows: it gets examples for a model that reads images one by one.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.data.collator import PackingCollator
from fastft.data.keys import IGNORE_INDEX, MAX_LENGTH_K, MAX_LENGTH_Q, SOUNDS, is_of_images
from fastft.data.pack import Pack, examples_of, is_pack
from fastft.data.processed import unbatched
from fastft.data.tasks.image_text import IMAGE_TEXT
from fastft.foreign.models import base_model
from fastft.integrations.probe.sounds import sound_key

# what a collator that packs says beside positions, from which the same follows
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", MAX_LENGTH_Q, MAX_LENGTH_K, "seq_idx")
_DECODER = ("decoder_input_ids", "decoder_attention_mask")
_TASKS = {
    "causal_lm": "ForCausalLM|LMHeadModel",
    "masked_lm": "ForMaskedLM",
    "token_classification": "ForTokenClassification",
    "sequence_classification": "ForSequenceClassification",
    "image_text_to_text": "ForConditionalGeneration",
    "seq2seq": "ForConditionalGeneration|ForSeq2SeqLM|MTModel|EncoderDecoderModel",
}
Batch = dict[str, Any]


class Unpackable(ValueError):
    """Batches that cannot be packed, or not without another loss; the message is a clause."""


def task_of(model: nn.Module) -> str:
    """The task of `PackingCollator` that a model computes its own loss for.

    Raises:
        Unpackable: none that is known.
    """
    base = base_model(model)
    config = getattr(base, "config", None)
    names = " ".join(kind.__name__ for kind in type(base).__mro__)
    if config is not None and sound_key(base) is not None:
        return "speech_seq2seq"
    for task, pattern in _TASKS.items():
        # a model for images and text is called as one with an encoder
        encodes = getattr(config, "is_encoder_decoder", False)
        fits = task not in (IMAGE_TEXT, "seq2seq") or encodes == (task == "seq2seq")
        if task == IMAGE_TEXT:
            fits = fits and "pixel_values" in inspect.signature(base.forward).parameters
        if config is not None and re.search(pattern, names) and fits:
            return task
    raise Unpackable(
        f"{type(base).__name__} has no task of PackingCollator's "
        f"({', '.join((*_TASKS, 'speech_seq2seq'))})"
    )


class PackedBatches:
    """A collator that packs what another one has padded; see the module.

    Args:
        collator: makes padded batches out of examples.
        task: of `PackingCollator`.
        options: of `PackingCollator`.

    Attributes:
        collator: as it was given.
        packing: the `PackingCollator`, by which the callbacks know packed batches.

    Raises:
        Unpackable: in a call, where the padded batch has what a packed one cannot have.
    """

    def __init__(self, collator: Any, task: str, **options: Any) -> None:
        self.collator = collator
        # where only a loss is asked for there are no rows to tell apart, and none to generate from
        self.packing = PackingCollator(task=task, pad_examples=True, **options)

    def __call__(self, features: Sequence[Any]) -> Any:
        """Collates examples or packs."""
        units = [[*map(_plain, examples_of(one))] if is_pack(one) else [one] for one in features]
        examples = [example for unit in units for example in unit]
        try:
            rows = self._rows(examples)
        except Unpackable as error:
            raise Unpackable(
                f"the batches of {type(self.collator).__name__} {error}; or leave packing out of "
                "fastft.plug"
            ) from None
        if len(rows) != len(examples):
            return self.packing([Pack(rows)])
        left = iter(rows)
        return self.packing([Pack([*itertools.islice(left, len(unit))]) for unit in units])

    def _rows(self, examples: list[Batch]) -> list[Batch]:
        if self.packing.task != IMAGE_TEXT:
            return rows_of(self.collator(examples), len(examples), self.packing.task)
        rows = list[Batch]()
        for example in examples:
            batch = dict(self.collator([example]).items())
            rows_of(batch, 1, IMAGE_TEXT)
            rows.append(unbatched({k: v for k, v in batch.items() if v is not None}))
        return rows


def rows_of(batch: Batch, examples: int, task: str) -> list[dict[str, Tensor]]:
    """The rows of a padded batch as examples, without padding.

    Args:
        batch: what a collator has made.
        examples: how many it was made of.
        task: of `PackingCollator`.

    Raises:
        Unpackable: as a clause that goes on from "its batches".
    """
    batch = {key: value for key, value in batch.items() if value is not None}
    if task == "speech_seq2seq":
        return _spoken(batch, examples)
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise Unpackable("have no input_ids of shape (rows, tokens)")
    if not isinstance(labels, Tensor):
        raise Unpackable("have no labels, of which the model computes its loss")
    flat = len(ids) != examples
    if flat and "position_ids" not in batch:
        raise Unpackable(f"have {len(ids)} rows for {examples} examples")
    if "position_ids" in batch:
        batch = {key: value for key, value in batch.items() if key not in _BOUNDARIES}
    of_examples = task in ("sequence_classification", "seq2seq")
    own = ("labels", *_DECODER) if of_examples else ()
    per_token = {
        key: value
        for key, value in batch.items()
        if key not in own and not (task == IMAGE_TEXT and is_of_images(key))
    }
    for key, value in per_token.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            raise Unpackable(f"have {key}, which is not a number for each token")
    real = per_token.pop("attention_mask", torch.ones_like(ids)).bool()
    if not of_examples and bool((labels[~real] != IGNORE_INDEX).any()):
        raise Unpackable("have labels at padding, which stock learns too: make those -100")
    rows = [
        {key: value[row][real[row]] for key, value in per_token.items()} for row in range(len(ids))
    ]
    if of_examples:
        for row, example in enumerate(rows):
            example |= _targets(batch, row) if task == "seq2seq" else {"labels": labels[row]}
    return rows


def _spoken(batch: Batch, examples: int) -> list[dict[str, Tensor]]:
    """The sounds of a padded batch, as they are, each with what it says."""
    sound, labels = next((key for key in SOUNDS if key in batch), None), batch.get("labels")
    if sound is None:
        raise Unpackable(f"have neither {' nor '.join(SOUNDS)}")
    if not isinstance(labels, Tensor) or len(labels) != examples or len(batch[sound]) != examples:
        raise Unpackable(f"have no labels and {sound} of {examples} rows")
    others = batch.keys() - {sound, "labels", "attention_mask", *_DECODER}
    if others:
        raise Unpackable(f"have {', '.join(sorted(others))}, which belong to no sound")
    rows = []
    for row in range(examples):
        heard = {key: batch[key][row] for key in (sound, "attention_mask") if key in batch}
        targets = _targets(batch, row)
        rows.append({"input_ids": targets["labels"], **targets, **heard})
    return rows


def _targets(batch: Batch, row: int) -> dict[str, Tensor]:
    """The decoder's tokens of one example, without the ignored ones at the end."""
    labels = batch["labels"][row]
    counted = (labels != IGNORE_INDEX).nonzero()
    end = int(counted[-1]) + 1 if len(counted) else 1
    return {key: batch[key][row][:end] for key in ("labels", "decoder_input_ids") if key in batch}


def shifts_usually(model: nn.Module) -> bool:
    """Whether a decoder reads `decoder_start_token_id`, then the labels, as `PackingCollator`
    makes it."""
    base: Any = base_model(model)
    shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return True
    first, second, third = range(base.config.pad_token_id + 1, base.config.pad_token_id + 4)
    made = shift(labels=torch.tensor([[first, second, third]]))
    return bool(made.tolist() == [[base.config.decoder_start_token_id, first, second]])


def first_position(model: nn.Module) -> int:
    """The position of a first token: 0, or behind the padding token as RoBERTa counts."""
    for name, module in base_model(model).named_modules():
        of_positions = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if of_positions and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0


def _plain(example: dict[str, Any]) -> dict[str, Any]:
    """Lists for the views of Arrow's memory, which `fastft.pack` reads a dataset by."""
    return {
        key: value.tolist() if type(value).__module__ == "numpy" else value
        for key, value in example.items()
    }
