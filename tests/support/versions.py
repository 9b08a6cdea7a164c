"""What a version of transformers calls a thing: it is asked, its number is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers
from torch import nn
from transformers import TrainingArguments

chosen_logits = pytest.mark.skipif(
    not hasattr(transformers.modeling_utils, "slice_logits_to_keep"),
    reason="this transformers keeps no chosen logits",
)
# its mask of packed images looks them up by their places in their own example
images_looked_up = pytest.mark.skipif(
    not hasattr(transformers.masking_utils, "remap_positions_for_packed_sequence"),
    reason="this transformers mixes only images that touch",
)

_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
# the argument of Trainer which has activations computed again in backward
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in _FIELDS
    else "gradient_checkpointing"
)


def checkpoint_activations(model: nn.Module, **options: Any) -> nn.Module:
    """Has the model compute its activations again in backward; `options` are
    torch.utils.checkpoint's."""
    new, old = (
        getattr(model, f"{kind}_checkpointing_enable", None) for kind in ("activation", "gradient")
    )
    (new or old)(options or None)
    return model
