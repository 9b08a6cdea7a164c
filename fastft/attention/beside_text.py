"""The parts of a model that stand beside its text: towers for images and sounds, what joins them.

Boundaries of a packed batch are of its text. A tower has tokens of its own, which it keeps apart by
itself: images are rows of its batch, or `image_grid_thw` says where they begin. Models of
transformers hand it the keyword arguments of the text all the same.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from fastft.foreign.models import base_model, output_embeddings


def parts_beside_text(model: nn.Module) -> list[nn.Module]:
    """Finds the outermost modules that are not on the way to the decoder of the text.

    Args:
        model: one of transformers, or one inside wrappers; of any other the answer is none.
    """
    base = base_model(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return []  # what its encoder reads is packed too
    decoder = getattr(base, "get_decoder", lambda: None)()
    # BERT's head is called decoder too
    if not isinstance(decoder, nn.Module) or not _reads_tokens(base, decoder):
        return []
    way = _way(base, decoder)
    text = (*way, decoder, output_embeddings(base))
    return [part for module in way for part in module.children() if part not in text]


def _reads_tokens(base: Any, part: nn.Module) -> bool:
    with contextlib.suppress(AttributeError, NotImplementedError):
        return any(module is base.get_input_embeddings() for module in part.modules())
    return False


def _way(module: nn.Module, goal: nn.Module) -> list[nn.Module]:
    """The modules from `module` to the one around `goal`; none where there is no way."""
    for child in module.children():
        if child is goal:
            return [module]
        way = _way(child, goal)
        if way:
            return [module, *way]
    return []
