"""The decoder's side of a packed batch: labels, the tokens that it reads, and its segments.

    decoder_input_ids[t] = decoder_start_token_id     where t is the first of a segment
                         = labels[t - 1]              elsewhere; pad_token_id where that is -100

Segment s of the decoder reads segment s of the encoder. Where a row of the decoder needs padding,
that padding reads padding of the encoder, so that every token of the decoder has something to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.data.columns import Columns, check_lengths, drop_masked, lengths_of, take_mask
from fastft.data.keys import DECODER_CU_SEQLENS, DECODER_MAX_LENGTH, IGNORE_INDEX, SEQ_IDX
from fastft.data.rows import Layout
from fastft.data.tasks.task import Task

if TYPE_CHECKING:
    from fastft.data.collator import PackingCollator

DECODER_KEYS = ("labels", "decoder_input_ids", "decoder_attention_mask")


class Seq2Seq(Task):
    """The decoder's tokens, m for an example of n tokens that the encoder reads."""

    sources = ()
    undivided = "task 'seq2seq' does not know which labels are whose"

    def take(self, columns: Columns) -> None:
        """Takes the decoder's columns, without the tokens that decoder_attention_mask masks."""
        decoder = {key: columns.pop(key) for key in DECODER_KEYS if key in columns}
        leading = next((key for key in DECODER_KEYS[:2] if key in decoder), None)
        if leading is None:
            raise ValueError(f"task 'seq2seq' needs labels, the examples have {sorted(columns)}")
        lengths = lengths_of(leading, decoder[leading])
        for key in decoder.keys() - {leading}:
            check_lengths(key, decoder[key], lengths, leading)
        mask = take_mask("decoder_attention_mask", decoder)
        self.beside = drop_masked("decoder_attention_mask", mask, decoder, lengths)
        self._decoder = decoder

    def fill(self, columns: Columns, layout: Layout) -> dict[str, Any]:
        """Lays the columns out, (R, T), and the decoder's, (R, U)."""
        self._layout = layout.beside(self.beside, self.collator.pad_to_multiple_of or 1)
        fills = {**self.fills, "decoder_input_ids": self.collator.pad_token_id}
        return super().fill(columns, layout) | self._layout.tensors(self._decoder, fills)

    def finish(self, batch: dict[str, Any], layout: Layout) -> None:
        """Adds the tokens that the decoder reads, if the examples have none, and its segments."""
        lengths = self._layout.lengths
        add_decoder_inputs(batch, lengths, self.collator)
        batch[DECODER_CU_SEQLENS] = torch.tensor(
            [0, *itertools.accumulate(lengths)], dtype=torch.int32
        )
        batch[DECODER_MAX_LENGTH] = max(lengths)


def add_decoder_inputs(
    batch: dict[str, Any], lengths: Sequence[int], collator: PackingCollator
) -> None:
    """Adds the tokens that the decoder reads, if the examples have none: the labels one later, in
    each segment of its own."""
    if "decoder_input_ids" in batch:
        return
    if collator.decoder_start_token_id is None:
        raise ValueError(
            f"task {collator.task!r} needs decoder_start_token_id (model.config has it) or "
            "examples with decoder_input_ids"
        )
    batch["decoder_input_ids"] = shifted_right(
        batch["labels"], lengths, collator.decoder_start_token_id, collator.pad_token_id
    )


def shifted_right(labels: Tensor, lengths: Sequence[int], start: int, pad_token_id: int) -> Tensor:
    """Makes what the decoder reads: labels (R, U) one token later, in each segment of its own."""
    shifted = labels.view(-1).roll(1)  # the last comes first, where a segment begins
    borders = itertools.accumulate(lengths, initial=0)
    begins = [border for border, length in zip(borders, lengths, strict=False) if length]
    shifted[begins] = start
    return shifted.masked_fill_(shifted == IGNORE_INDEX, pad_token_id).view(labels.shape)


def seq2seq_masks(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Makes the masks of a packed batch for stock attention: True where a query sees a key.

    transformers' encoder-decoder models take one `attention_mask` for the encoder and for what the
    decoder sees of it; with packed examples the two differ, so the encoder runs first:

        encoder, decoder, cross = fastft.seq2seq_masks(batch)
        states = model.get_encoder()(batch["input_ids"], attention_mask=encoder)
        model(
            encoder_outputs=states,
            attention_mask=cross,
            decoder_attention_mask=decoder,
            decoder_input_ids=batch["decoder_input_ids"],
            labels=batch["labels"],
        )

    Exact for T5; models with absolute positions have no argument for the decoder's.

    Args:
        batch: of `PackingCollator(task="seq2seq")`.

    Returns:
        encoder, bool (R, 1, T, T); decoder, causal, bool (R, 1, U, U); cross, bool (R, 1, U, T).

    Raises:
        ValueError: the batch has no `decoder_cu_seq_lens`.
    """
    if DECODER_CU_SEQLENS not in batch:
        raise ValueError(f"batch must be one of task 'seq2seq', got the keys {sorted(batch)}")
    keys = batch[SEQ_IDX]
    tokens = batch["decoder_input_ids"]
    queries = torch.repeat_interleave(
        batch[DECODER_CU_SEQLENS].diff(), output_size=tokens.numel()
    ).view(tokens.shape)

    def same(first: Tensor, second: Tensor) -> Tensor:
        return (first[:, :, None] == second[:, None, :])[:, None]

    return same(keys, keys), same(queries, queries).tril(), same(queries, keys)
