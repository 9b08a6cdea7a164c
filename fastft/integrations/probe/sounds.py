"""Sounds that the packing probe gives an encoder of speech in the place of tokens.

Random numbers, drawn by the tokens that stand for them: other tokens, another sound. Which shape
an encoder takes nobody says but the encoder, so that it is asked: windows of the length that the
configuration has (Whisper), a waveform (`input_values`), frames of features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastft.data.keys import SOUNDS

_SAMPLES = 8_000  # of a waveform: half a second
_FRAMES = 96  # of features: a second
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_size", "mel_bins")


def sound_key(base: Any) -> str | None:
    """What the encoder of an encoder-decoder model for speech reads; None for other models."""
    if not getattr(base.config, "is_encoder_decoder", False):
        return None
    parts = base, base.get_encoder()  # of an encoder and a decoder put together the first says none
    names = (getattr(part, "main_input_name", None) for part in parts)
    return next((name for name in names if name in SOUNDS), None)


def shape_of_sounds(base: Any, key: str) -> tuple[int, ...]:
    """Finds the shape of one sound that the encoder takes.

    Raises:
        ValueError: it takes none of those that its configuration tells of.
    """
    weight = next(base.parameters())
    encoder = base.get_encoder()
    said = []
    for shape in _shapes(base.config, key):
        try:
            encoder(torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device))
        except Exception as error:  # the next one, then
            said.append(f"{shape}: {' '.join(str(error).split())[:100]}")
            continue
        return shape
    raise ValueError(f"its encoder takes no {key} of a known shape ({'; '.join(said)})")


def _shapes(config: Any, key: str) -> Iterator[tuple[int, ...]]:
    if key == "input_values":
        yield (_SAMPLES,)
        return
    parts = [config, *(getattr(config, name, None) for name in ("encoder_config", "encoder"))]
    for part in parts:
        places = getattr(part, "max_source_positions", None)
        for bins in (getattr(part, name, None) for name in _BINS):
            if bins and places:
                yield bins, 2 * places
            if bins:
                yield _FRAMES, bins


def sounds(tokens: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draws sounds (rows, *shape) for rows of tokens (rows, n)."""
    made = []
    for row in tokens:
        seed = hash(tuple(row.tolist())) % 2**31
        made.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(made).to(dtype)
