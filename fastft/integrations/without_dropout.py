"""Trainings without dropout, for comparisons of batches that have another shape: the same random
numbers are other masks there."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastft.foreign import models


def switch_off_dropout(model: nn.Module) -> None:
    """Makes every probability of dropout 0, of whole layers too (`layerdrop`).

    Models keep them in modules (`nn.Dropout.p`), in numbers of modules that hand them to attention
    (`attention_dropout`), and in configurations which are read in forward.
    """
    base = models.base_model(model)
    for module in base.modules():
        if "drop" in type(module).__name__.lower():
            _make_zero(module, "p")
        for name in [name for name in vars(module) if "drop" in name.lower()]:
            _make_zero(module, name)
        config = getattr(module, "config", None)
        for part in (config, *vars(config).values()) if hasattr(config, "to_dict") else ():
            if part is config or hasattr(part, "to_dict"):  # a part of a configuration: of the text
                for name in [name for name in vars(part) if "drop" in name.lower()]:
                    _make_zero(part, name)


def _make_zero(thing: Any, name: str) -> None:
    if isinstance(getattr(thing, name, None), float):
        setattr(thing, name, 0.0)
