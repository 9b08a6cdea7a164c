"""The decoder's side of a packed batch: labels, the tokens which the decoder reads, and its
segments.

    decoder_input_ids[t] = decoder_start_token_id     where t is the first of a segment
                         = labels[t - 1]              elsewhere; pad_token_id where that is -100

Segment s of the decoder reads segment s of the encoder. Where a row of the decoder needs padding,
that padding reads padding of the encoder, so that every token of the decoder has something to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.data.columns import check_lengths, drop_masked, flatten_integers, lengths_of, take_mask
from fastft.data.keys import IGNORE_INDEX
from fastft.data.rows import Layout, lay_out, width_of

DECODER_KEYS = ("labels", "decoder_input_ids", "decoder_attention_mask")


def take_decoder(columns: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], list[int]]:
    """Takes the decoder's columns out of `columns`, without the tokens which decoder_attention_mask
    masks.

    Returns them and the tokens of each example.

    Raises:
        ValueError: there are neither labels nor decoder_input_ids, they are empty, or of different
            lengths.
    """
    decoder = {key: columns.pop(key) for key in DECODER_KEYS if key in columns}
    leading = next((key for key in DECODER_KEYS[:2] if key in decoder), None)
    if leading is None:
        raise ValueError(f"task 'seq2seq' needs labels, the examples have {sorted(columns)}")
    lengths = lengths_of(leading, decoder[leading])
    for key in decoder.keys() - {leading}:
        check_lengths(key, decoder[key], lengths, leading)
    mask = take_mask("decoder_attention_mask", decoder)
    return decoder, drop_masked("decoder_attention_mask", mask, decoder, list(decoder), lengths)


def lay_out_both(
    encoder: Sequence[int], decoder: Sequence[int], rows: Sequence[Sequence[int]], multiple: int
) -> tuple[Layout, Layout]:
    """The layouts of both sides, which have the same segments; those of the decoder may have no
    tokens."""
    width, decoder_width = width_of(encoder, rows, multiple), width_of(decoder, rows, multiple)

    def padding(lengths: Sequence[int], row: Sequence[int], width: int) -> int:
        return width - sum(lengths[example] for example in row)

    if any(
        padding(decoder, row, decoder_width) and not padding(encoder, row, width) for row in rows
    ):
        width += multiple
    padded = [padding(encoder, row, width) > 0 for row in rows]
    return lay_out(encoder, rows, width), lay_out(decoder, rows, decoder_width, padded)


def shift_right(labels: Tensor, lengths: Sequence[int], start: int, pad_token_id: int) -> Tensor:
    """What the decoder reads: labels (R, U) one token later, in each segment of its own."""
    shifted = labels.new_empty(labels.shape)
    flat = shifted.view(-1)
    flat[1:] = labels.view(-1)[:-1]
    borders = itertools.accumulate(lengths, initial=0)
    flat[
        torch.tensor([border for border, length in zip(borders, lengths, strict=False) if length])
    ] = start
    return shifted.masked_fill_(shifted == IGNORE_INDEX, pad_token_id)


def decoder_columns(
    columns: dict[str, list[Any]], layout: Layout, pad_token_id: int
) -> dict[str, Tensor]:
    """The decoder's columns as its segments lie, (R, U)."""
    fills, shape = (
        {"labels": IGNORE_INDEX, "decoder_input_ids": pad_token_id},
        (layout.rows, layout.width),
    )
    return {
        key: flatten_integers(key, layout.arrange(values, fills[key])).view(shape)
        for key, values in columns.items()
    }


def decoder_batch(
    columns: dict[str, list[Any]], layout: Layout, start: int | None, pad_token_id: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The integers of the decoder's side and its boundaries.

    Raises:
        ValueError: the examples have no decoder_input_ids and there is no `start`.
    """
    integers = decoder_columns(columns, layout, pad_token_id)
    if "decoder_input_ids" not in integers:
        if start is None:
            raise ValueError(
                "task 'seq2seq' needs decoder_start_token_id (model.config has it) or examples "
                "with decoder_input_ids"
            )
        integers["decoder_input_ids"] = shift_right(
            integers["labels"], layout.lengths, start, pad_token_id
        )
    borders = torch.tensor([0, *itertools.accumulate(layout.lengths)], dtype=torch.int32)
    return integers, {"decoder_cu_seq_lens": borders, "decoder_max_length": max(layout.lengths)}


def seq2seq_masks(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The three masks of a packed batch for stock attention, which has no boundaries: True where a
    query sees a key.

    transformers' encoder-decoder models take one `attention_mask` for the encoder and for what the
    decoder sees of it; with packed examples the two differ, so the encoder runs first:

        encoder, decoder, cross = fastft.seq2seq_masks(batch)
        states = model.get_encoder()(batch["input_ids"], attention_mask=encoder)
        model(encoder_outputs=states, attention_mask=cross, decoder_attention_mask=decoder,
        labels=batch["labels"],
              decoder_input_ids=batch["decoder_input_ids"])

    Exact for T5; models with absolute positions have no argument for the decoder's.

    Args:
        batch: of `PackingCollator(task="seq2seq")`.

    Returns:
        encoder, bool (R, 1, T, T); decoder, causal, bool (R, 1, U, U); cross, bool (R, 1, U, T).

    Raises:
        ValueError: the batch has no `decoder_cu_seq_lens`.
    """
    if "decoder_cu_seq_lens" not in batch:
        raise ValueError(f"batch must be one of task 'seq2seq', got the keys {sorted(batch)}")
    keys = batch["seq_idx"]
    tokens = batch["decoder_input_ids"]
    lengths = batch["decoder_cu_seq_lens"].diff()
    queries = torch.repeat_interleave(lengths, output_size=tokens.numel()).view(tokens.shape)

    def same(first: Tensor, second: Tensor) -> Tensor:
        return (first[:, :, None] == second[:, None, :])[:, None]

    return same(keys, keys), same(queries, queries).tril(), same(queries, keys)
