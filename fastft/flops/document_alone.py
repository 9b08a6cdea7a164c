"""A batch of one document, in the form that batches of many have, for a model's twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastft.data.keys import (
    BOUNDARY_KEYS,
    LABEL_SEGMENTS,
    LOGITS_TO_KEEP,
    PADDING_LENGTHS,
    SHIFT_LABELS,
    USE_CACHE,
)

# what says where documents lie in a batch, which one alone need not be told
_OF_BATCHES = {
    *BOUNDARY_KEYS,
    LABEL_SEGMENTS,
    LOGITS_TO_KEEP,
    PADDING_LENGTHS,
    SHIFT_LABELS,
    USE_CACHE,
    "position_ids",
    "num_items_in_batch",
    "decoder_input_ids",
    "decoder_attention_mask",
}
_MAY_BE_FLOAT = {"attention_mask", "inputs_embeds", "labels"}


def more_than_tokens(inputs: Mapping[str, Any]) -> list[str]:
    """Keys of images, sounds and the like, whose cost no length of a text tells."""
    return [
        key
        for key, value in inputs.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 0
        and key not in _MAY_BE_FLOAT
    ]


def document_alone(
    inputs: Mapping[str, Any], tokens: int, outputs: int | None, last: int | None
) -> dict[str, Tensor]:
    """Makes a batch of one document, with the keys and dtypes of `inputs`.

    Args:
        inputs: padded or packed batch; every tensor has rows first, those with a place for each
            token have it second (third in multiple choice).
        tokens: length of the document.
        outputs: length of its labels, for a decoder beside an encoder.
        last: its last token, e.g. the one that classifiers look for.
    """
    key = "input_ids" if "input_ids" in inputs else "inputs_embeds"
    axis = inputs[key].dim() - (2 if key == "inputs_embeds" else 1)
    made = {}
    for name, value in inputs.items():
        if name in _OF_BATCHES or not isinstance(value, Tensor) or value.dim() == 0:
            continue
        shape = [1, *value.shape[1:]]
        if value.dim() > axis and value.shape[: axis + 1] == inputs[key].shape[: axis + 1]:
            shape[1 : axis + 1] = [*[1] * (axis - 1), tokens]
        if name == "labels" and outputs is not None:
            shape[1] = outputs
        made[name] = torch.ones(shape, dtype=value.dtype)
    if key == "input_ids" and last is not None:
        made[key][..., -1] = last
    mask = torch.ones(made[key].shape[: axis + 1], dtype=torch.int64)
    return {**made, "attention_mask": mask}
