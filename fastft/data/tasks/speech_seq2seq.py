"""Sounds and what they say: the encoder has a row for each example, the decoder is packed.

Encoders of speech take windows of a fixed length, or convolve over a whole row, so that nothing of
theirs can be packed; their inputs become the batch that a padding collator makes of the same
examples. Segment s of the decoder reads the states of example s (`fastft/attention/encoder_rows.py`
lays them end to end). Padding of a decoder's row belongs to the last example in it, which is
causal, and so does not see it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.data.batch import PackedBatch, count_labels
from fastft.data.columns import Columns, check_lengths, lengths_of
from fastft.data.features import columns_of
from fastft.data.keys import (
    DECODER_CU_SEQLENS,
    DECODER_MAX_LENGTH,
    DECODER_POSITIONS,
    IGNORE_INDEX,
    SOUNDS,
    USE_CACHE,
)
from fastft.data.pack import examples_of, is_pack
from fastft.data.rows import balanced_rows, lay_out
from fastft.data.tasks.seq2seq import add_decoder_inputs
from fastft.data.tasks.task import Task

ROW_TOKENS = 448  # of a decoder's row, at most: Whisper's table of positions
_MASK = "attention_mask"  # of the sound's frames


class SpeechSeq2Seq(Task):
    """The decoder's tokens, and an encoder's batch beside them; makes the whole batch by itself."""

    label_keys = ("labels", "decoder_input_ids", *SOUNDS, _MASK)

    def batch(self, features: list[Any]) -> PackedBatch:
        """Makes the batch of `PackingCollator(task="speech_seq2seq")`.

        Raises:
            ValueError: an example has no sound, no labels, or others than the first one has.
        """
        self._pads = self.collator.pad_examples and not any(map(is_pack, features))
        columns, _ = columns_of([*_examples(features)], self.label_keys)
        sound = next((key for key in SOUNDS if key in columns), None)
        if sound is None:
            raise ValueError(
                f"task 'speech_seq2seq' needs {' or '.join(SOUNDS)}, the examples have "
                f"{sorted(columns.keys() - {'input_ids'})}"
            )
        decoder = {key: columns[key] for key in self.label_keys[:2] if key in columns}
        lengths = lengths_of("labels", columns["labels"])
        for key in decoder.keys() - {"labels"}:
            check_lengths(key, decoder[key], lengths, "labels")
        rows = self._rows(lengths)
        layout = lay_out(lengths, rows, self.collator.pad_to_multiple_of or 1)
        order = list(itertools.chain(*layout.members))
        batch = PackedBatch(_sounds(sound, columns, order))
        batch |= layout.tensors(
            decoder, {"labels": IGNORE_INDEX, "decoder_input_ids": self.collator.pad_token_id}
        )
        self._boundaries(batch, lengths, layout.members, layout.width)
        batch[USE_CACHE] = False
        batch.count = functools.partial(count_labels, batch["labels"], [], [])
        return batch

    def _rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Shares the examples out over the fewest rows of at most `row_tokens`; where they are
        padded, each has one."""
        if self._pads:
            return [[example] for example in range(len(lengths))]
        most = max(self.collator.row_tokens, *lengths)
        for count in range(-(-sum(lengths) // most), len(lengths)):
            rows = balanced_rows(lengths, count)
            if max(sum(lengths[one] for one in row) for row in rows) <= most:
                return rows
        return [[example] for example in range(len(lengths))]

    def _boundaries(
        self,
        batch: dict[str, Any],
        lengths: Sequence[int],
        members: Sequence[Sequence[int]],
        width: int,
    ) -> None:
        """Adds where the examples begin, their positions, and what the decoder reads."""
        own = [[lengths[example] for example in row] for row in members]
        padded = [[*row[:-1], row[-1] + width - sum(row)] for row in own]
        segments = list(itertools.chain(*padded))
        add_decoder_inputs(batch, segments, self.collator)
        if self._pads:
            return
        first = self.collator.position_ids_start
        places = [
            place if place < length else 0  # padding, which no table need have a place for
            for length, segment in zip(itertools.chain(*own), segments, strict=True)
            for place in range(segment)
        ]
        batch[DECODER_POSITIONS] = torch.tensor(places).view(len(own), width) + first
        batch[DECODER_CU_SEQLENS] = torch.tensor(
            [0, *itertools.accumulate(segments)], dtype=torch.int32
        )
        batch[DECODER_MAX_LENGTH] = max(segments)


def check_speech(rows: int, expand_on_device: bool) -> None:
    """Raises ValueError for options of a collator that its batches of speech do not have."""
    if rows != 1:
        raise ValueError(
            f"rows={rows} does not go with task 'speech_seq2seq', whose decoder has as many rows "
            "as row_tokens makes of the examples"
        )
    if expand_on_device:
        raise ValueError("expand_on_device does not go with task 'speech_seq2seq'")


def _examples(features: list[Any]) -> Iterator[dict[str, Any]]:
    """Yields the examples, also those of packs, with the tokens of their decoder as `input_ids`."""
    for feature in features:
        if not isinstance(feature, dict):
            raise TypeError(f"the collator takes dicts or packs, got {type(feature).__name__}")
        for example in examples_of(feature) if is_pack(feature) else [feature]:
            if "labels" not in example:
                raise ValueError(
                    f"task 'speech_seq2seq' needs labels, an example has {sorted(example)}"
                )
            yield {**example, "input_ids": example["labels"]}


def _sounds(key: str, columns: Columns, order: Sequence[int]) -> dict[str, Tensor]:
    """The encoder's batch, in the order of the segments: (E, ...), zeros where an example is
    shorter, and a mask of the frames, (E, L), if the examples have one or differ."""
    values = [_array(key, index, columns[key][index]) for index in order]
    longest = [max(sizes) for sizes in zip(*[value.shape for value in values], strict=True)]
    made = torch.zeros(len(values), *longest, dtype=values[0].dtype)
    for row, value in zip(made, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    differing = [
        axis
        for axis in range(len(longest))
        if any(value.shape[axis] != longest[axis] for value in values)
    ]
    if len(differing) > 1:
        raise ValueError(f"{key} of the examples differ in more than their length")
    frames = [value.shape[differing[0]] for value in values] if differing else []
    masks = columns.get(_MASK)
    if masks is not None:
        given = [torch.as_tensor(masks[index]).long() for index in order]
        mask = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
    elif frames:
        mask = (torch.arange(max(frames)) < torch.tensor(frames)[:, None]).long()
    else:
        return {key: made}
    return {key: made, _MASK: mask}


def _array(key: str, index: int, value: Any) -> Tensor:
    try:
        made = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} of example {index} must be an array of numbers: {error}") from None
    if made.ndim == 0 or made.numel() == 0:
        raise ValueError(f"{key} of example {index} must be an array, got {tuple(made.shape)}")
    return made.float() if made.dtype == torch.float64 else made
