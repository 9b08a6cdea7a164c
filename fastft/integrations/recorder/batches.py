"""What a batch holds, said so that a padded and a packed form of it say the same.

A document is a row, or where a row is packed, each piece of it that begins anew. Padding is left
out; so is the label of a causal document's first token, which no model predicts, and which packing
therefore ignores. A batch is then the multiset of its documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastft.commands.trace import Micro
from fastft.data.keys import (
    DECODER_CU_SEQLENS,
    IGNORE_INDEX,
    LABEL_KEYS,
    LABEL_SEGMENTS,
)
from fastft.integrations.batch_segments import segments_of

_SHIFTS = (1, 0, 2)  # the likely first
# of whole examples besides labels: answers of a text, as models for questions have them
_ANSWERS = ("start_positions", "end_positions", "next_sentence_label")


@dataclass(frozen=True)
class Reading:
    """How a model reads its labels.

    Attributes:
        causal: it shifts them, and predicts a token from those before.
        masked: a label is the token that the input hides.
        apart: they are another text, a decoder's.
    """

    causal: bool = False
    masked: bool = False
    apart: bool = False

    @classmethod
    def of(cls, model: Any) -> Reading:
        """That of a transformers model, by its configuration and the name of its class."""
        name = type(model).__name__
        masked = "ForMaskedLM" in name or "ForPreTraining" in name
        apart = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        apart = apart and any(kind in name for kind in ("Generation", "LMHead", "MTModel"))
        kinds = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "DoubleHeads")
        return cls(not apart and not masked and any(k in name for k in kinds), masked, apart)


def digest(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits of these bytes."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()


def described(batch: Any, loss: float, reading: Reading) -> Micro:
    """A pass over `batch`, the model's keyword arguments; one without tokens is digested whole."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.is_floating_point():
        whole = digest(_bytes_of_all(batch))
        return Micro(loss, inputs=whole, targets=whole)
    tensors = {
        key: value.detach().cpu() for key, value in batch.items() if isinstance(value, Tensor)
    }
    return _Documents(tensors, reading).micro(loss)


def shift_of(learning: Tensor | None, batch: Any) -> int | None:
    """By how many positions the rows that learn, bool (R, T), come before the labels (R, T)."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if learning is None or not isinstance(labels, Tensor) or labels.shape != learning.shape:
        return None
    counted = labels.detach().cpu() != IGNORE_INDEX
    width = counted.shape[-1]
    for shift in _SHIFTS:
        rows = torch.zeros_like(counted)
        rows[..., : width - shift] = counted[..., shift:]
        if torch.equal(rows, learning):
            return shift
    return None


def neighbours(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The places, int64 each, of two documents one after another in the same row of a packed batch.

    The former is another one when it is turned round. None where there are no two such.
    """
    tensors = {
        key: value.detach().cpu() for key, value in batch.items() if isinstance(value, Tensor)
    }
    ids = tensors["input_ids"]
    segments = [s for s in segments_of(tensors) if len(s)]
    for former, latter in pairwise(segments):
        tokens = ids.reshape(-1)[former]
        same_row = int(former[0]) // ids.shape[-1] == int(latter[-1]) // ids.shape[-1]
        if same_row and not torch.equal(tokens, tokens.flip(0)):
            return former, latter
    return None


class _Documents:
    """The documents of one batch: slices of its flattened tokens, and their labels."""

    def __init__(self, batch: dict[str, Tensor], reading: Reading) -> None:
        ids = batch["input_ids"]
        self.elements, self.batch, self.reading = ids.numel(), batch, reading
        segments = segments_of(batch)
        self.ids = ids.reshape(-1)
        labels = batch.get("labels")
        per_token = labels is not None and labels.shape == ids.shape and not reading.apart
        self.labels = labels.reshape(-1).clone() if labels is not None and per_token else None
        if reading.causal and self.labels is not None:
            self.labels[[int(where[0]) for where in segments]] = IGNORE_INDEX
        self.segments = segments
        self.outside = self._labels_outside() if self.labels is None else []
        self.real = [i for i in range(len(self.segments)) if not self._is_padding(i)]

    def _is_padding(self, index: int) -> bool:
        """Whether a segment of a text and its translation is padding, of which no key says so: one
        token again and again, without a label."""
        if DECODER_CU_SEQLENS not in self.batch:
            return False
        tokens = self.ids[self.segments[index]]
        return not self.outside[index] and bool((tokens == tokens[:1]).all())

    def _labels_outside(self) -> list[bytes]:
        """What each document is labelled with where tokens are not: a class, an answer, a text."""
        columns = [
            self._column(self.batch[key]) for key in (*LABEL_KEYS, *_ANSWERS) if key in self.batch
        ]
        return [b"".join(parts) for parts in zip(*columns, strict=False)] if columns else []

    def _column(self, values: Tensor) -> list[bytes]:
        count = len(self.segments)
        if DECODER_CU_SEQLENS in self.batch:
            borders = self.batch[DECODER_CU_SEQLENS].tolist()
            flat = values.reshape(-1)
            rows = [flat[a:b] for a, b in pairwise(borders)]
        else:
            rows = list(values.reshape(values.shape[0], -1) if values.dim() else values.view(1, 1))
        if LABEL_SEGMENTS in self.batch:
            of = dict(zip(self.batch[LABEL_SEGMENTS].tolist(), rows, strict=False))
            rows = [of.get(index, values.new_empty(0)) for index in range(count)]
        return [_bytes(row[row != IGNORE_INDEX]) for row in rows]

    def micro(self, loss: float) -> Micro:
        """What is to be said of them."""
        inputs, targets, tokens, supervised = [], [], 0, 0
        for index in self.real:
            where = self.segments[index]
            text, labels = self.ids[where], None if self.labels is None else self.labels[where]
            if labels is not None and self.reading.masked:
                text = torch.where(labels == IGNORE_INDEX, text, labels)
            tokens += len(where)
            supervised += 0 if labels is None else int((labels != IGNORE_INDEX).sum())
            inputs.append(_bytes(text))
            label = self.outside[index] if index < len(self.outside) else b""
            label = label if labels is None else _bytes(labels)
            targets.append(digest((_bytes(self.ids[where]), label)).encode())
        if self.labels is None:
            supervised = self._supervised_outside()
        return Micro(
            loss,
            inputs=digest(sorted(inputs)),
            targets=digest(sorted(targets)),
            documents=len(self.real),
            packed=len(self.real) > self.batch["input_ids"].shape[:-1].numel(),
            tokens=tokens,
            supervised=supervised,
            padding=self.elements - tokens,
            ignored=0 if self.labels is None else tokens - supervised,
        )

    def _supervised_outside(self) -> int:
        labels = next((self.batch[key] for key in LABEL_KEYS if key in self.batch), None)
        if labels is None:
            return len(self.real) if self.outside else 0
        return int((labels != IGNORE_INDEX).sum())


def _bytes(tensor: Tensor) -> bytes:
    if not tensor.is_floating_point():
        tensor = tensor.long()
    data: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def _bytes_of_all(value: Any) -> Iterable[bytes]:
    """Everything in a batch of any shape, tensors in their order."""
    if isinstance(value, Tensor):
        yield _bytes(value.detach().cpu())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _bytes_of_all(value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _bytes_of_all(part)
    else:
        yield repr(value).encode()
