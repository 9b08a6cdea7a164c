"""Stock trainings that say what a difference means: one with the smallest noise, one in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastft import foreign

_SEED = 0


def add_noise(model: Any) -> str:
    """Changes what enters the output head by one unit in its last place, up or down at random.

    The gradient passes through as it is. The signs come from a generator of their own. The unit is
    that of the dtype in which the head computes, autocast's where that is at work.

    Returns:
        Where the noise is, in words. Without a head for a vocabulary it is what enters the model's
        last module; and where that cannot be told, each element of the first weight, once.
    """
    base = foreign.base_model(model)
    head = foreign.output_embeddings(base)
    place = "the output head's input"
    if head is None:
        backbone = getattr(base, "base_model", None)
        others = [
            (name, module)
            for name, module in base.named_children()
            if module is not backbone and next(module.parameters(), None) is not None
        ]
        if backbone is base or not others:
            return _of_first_weight(base)
        name, head = others[-1]
        place = f"the input of {name}"
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
            return None
        hidden = inputs[0]
        if hidden.device not in generators:
            generators[hidden.device] = torch.Generator(hidden.device).manual_seed(_SEED)
        return (_disturbed(hidden, generators[hidden.device]), *inputs[1:])

    head.register_forward_pre_hook(disturb)
    return f"one ulp on {place}"


def _disturbed(value: Tensor, generator: torch.Generator) -> Tensor:
    kind = value.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    up = torch.randint(2, value.shape, generator=generator, device=value.device, dtype=torch.int8)
    unit = torch.finfo(dtype).eps
    return value * (up.to(value.dtype) * (2 * unit) + (1 - unit))


def _of_first_weight(base: nn.Module) -> str:
    name, weight = next((n, p) for n, p in base.named_parameters() if p.is_floating_point())
    with torch.no_grad():
        weight.copy_(_disturbed(weight, torch.Generator(weight.device).manual_seed(_SEED)))
    return f"one ulp on {name}, once"


def train_in_fp32(model: Any, accelerator: Any) -> None:
    """Makes the weights fp32, the same numbers, and switches autocast off.

    The parameters stay the objects that an optimizer may hold by now.
    """
    model.float()
    accelerator.native_amp = False
