"""Positions of several axes (mRoPE), as the model itself makes them for one example.

A token of an image has a position in time, height and width, and what follows an image begins
behind the largest of these. How, each model says in its `get_rope_index`, which is asked for one
example after another: in a packed row each begins as it does alone.

    (1 + A, n): the place in the example, by which transformers' masks find where sequences begin;
                then the A axes

The method needs the model's configuration, but none of its weights: here an object of the same
class has it, without parameters and parts, so that a collator can go to the workers of a
`DataLoader`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign.models import base_model

METHOD = "get_rope_index"


def _asked(model: nn.Module) -> nn.Module | None:
    """Finds the part of a model that makes its positions of several axes; None without one."""
    base = base_model(model)
    body = getattr(base, "base_model", base)
    return next((part for part in (body, base) if hasattr(part, METHOD)), None)


def has_several_axes(model: nn.Module) -> bool:
    """Tells whether `model` makes positions of several axes out of images."""
    return _asked(model) is not None


class MultiAxisPositions:
    """What a model knows of positions, without its weights.

    Args:
        part: of a model; it has `get_rope_index`.

    Attributes:
        axes: A.

    Raises:
        ValueError: it cannot be asked for a text.
    """

    def __init__(self, part: nn.Module) -> None:
        kind = type(part)
        self._part: Any = kind.__new__(kind)
        nn.Module.__init__(self._part)
        plain = (bool, int, float, str, tuple, list)
        for name, value in vars(part).items():
            if name == "config" or (not name.startswith("_") and isinstance(value, plain)):
                vars(self._part)[name] = value
        self._takes = {*inspect.signature(getattr(part, METHOD)).parameters}
        text = torch.zeros(1, 2, dtype=torch.int64)
        try:
            self.axes = len(self._ask({"input_ids": text, "mm_token_type_ids": text}))
        except Exception as error:
            raise ValueError(
                f"model makes positions of several axes ({kind.__name__}.{METHOD}), but cannot be "
                f"asked for those of a text: {error!r}"
            ) from error

    def _ask(self, inputs: dict[str, Any]) -> Tensor:
        """The positions (A, n) of one example."""
        inputs = {key: value for key, value in inputs.items() if key in self._takes}
        if "attention_mask" in self._takes:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        made: Tensor = getattr(self._part, METHOD)(**inputs)[0]
        return made[:, 0]

    def __call__(self, tokens: dict[str, Tensor], images: dict[str, Tensor]) -> Tensor:
        """Makes the positions of an example, int64 (1 + A, n).

        Args:
            tokens: int64 (n,) by key, `input_ids` among them.
            images: what the processor gave of its images, by key.

        Raises:
            ValueError: the model makes none of this, as where `mm_token_type_ids` are missing.
        """
        places = torch.arange(len(tokens["input_ids"]))
        if not any(key in self._takes for key in images):
            return places.expand(1 + self.axes, -1)  # a text is numbered alike on all axes
        try:
            made = self._ask({key: value[None] for key, value in tokens.items()} | images)
        except Exception as error:
            reads, given = (", ".join(sorted(keys)) for keys in (self._takes, {*tokens, *images}))
            raise ValueError(
                f"{type(self._part).__name__}.{METHOD}, which reads {reads}, cannot make the "
                f"positions of an example with {given}: {error!r}. Keep in each example all that "
                "its processor gives, and all tokens of its images"
            ) from error
        return torch.cat([places[None], made.to(places.dtype)])


def positions_of(model: Any) -> MultiAxisPositions | None:
    """Prepares what makes positions for a model's packed batches; None where these have one axis.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    part = _asked(model)
    return None if part is None else MultiAxisPositions(part)
