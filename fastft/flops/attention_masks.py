"""Which modules are attention, and how many pairs of tokens their masks hide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Mask(NamedTuple):
    """What one kind of self-attention lets a token see.

    Attributes:
        of_outputs: the tokens are those of a decoder beside an encoder.
        causal: none that comes later.
        window: how many in one direction, the token itself among them; None for all.
    """

    of_outputs: bool
    causal: bool
    window: int | None

    def hidden_pairs(self, length: Tensor) -> Tensor:
        """How many pairs of tokens are hidden, (S,), in documents of these lengths, (S,)."""
        reach = length if self.window is None else length.clamp(max=self.window)
        seen = length * reach - reach * (reach - 1) / 2  # in one direction
        return length * length - (seen if self.causal else 2 * seen - length)


def attention_modules(model: Any) -> dict[str, nn.Module]:
    """The modules that may be attention, by the names that torch's counter gives them."""
    root = type(model).__name__
    return {
        f"{root}.{name}": module
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() or hasattr(module, "is_causal")
    }


def innermost(names: list[str]) -> Iterator[str]:
    """Yields the names of modules that contain none of the others."""
    for name in names:
        if not any(other.startswith(f"{name}.") for other in names):
            yield name


def mask_of(module: Any, model: Any, of_outputs: bool) -> Mask:
    """What `module` says of its mask; where it says nothing, what is true of the whole `model`."""
    config = getattr(model, "config", None)
    predicts_the_next = any(word in type(model).__name__ for word in ("CausalLM", "LMHead"))
    causal = getattr(module, "is_causal", getattr(module, "is_decoder", predicts_the_next))
    window = getattr(module, "sliding_window", None)
    if not hasattr(module, "sliding_window") and not getattr(config, "layer_types", None):
        window = getattr(config, "sliding_window", None)
    is_window = isinstance(window, int) and not isinstance(window, bool) and window > 0
    return Mask(of_outputs, bool(causal), window if is_window else None)
