"""Stock trainings that say what a difference means: one with the smallest noise, one in fp32."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import models

_SEED = 0
_ROWS = 64  # of log-softmax in float64 at once


def add_noise(model: Any) -> str:
    """Changes what enters the output head by one unit in its last place, up or down at random.

    The gradient passes through as it is. The signs come from a generator of their own. The unit is
    that of the dtype in which the head computes, autocast's where that is at work.

    Returns:
        Where the noise is, in words. Without a head for a vocabulary it is what enters the model's
        last module; and where that cannot be told, each element of the first weight, once.
    """
    base = models.base_model(model)
    head = models.output_embeddings(base)
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


def sum_exactly() -> torch.library.Library:
    """Has log-softmax add in float64, for all of this process, as long as the library is kept.

    torch's fp32 one on a CPU loses the small terms of a large vocabulary beside the large ones: the
    loss of 49,152 classes is off by 2e-6 of itself, each time in the same direction, which no noise
    on its input would show.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a kernel already, which is the point
        for key in ("CPU", "CUDA"):
            library.impl("_log_softmax", _log_softmax, key)
            library.impl("_log_softmax_backward_data", _log_softmax_backward, key)
    return library


def _rows(value: Tensor, dim: int) -> Tensor:
    return value.movedim(dim, -1).reshape(-1, value.shape[dim] if value.ndim else 1)


def _placed(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    return rows.view(like.movedim(dim, -1).shape).movedim(-1, dim).contiguous()


def _log_softmax(value: Tensor, dim: int, half_to_float: bool) -> Tensor:
    rows = _rows(value, dim)
    out = torch.empty_like(rows, dtype=torch.float32 if half_to_float else value.dtype)
    for part, into in zip(rows.split(_ROWS), out.split(_ROWS), strict=True):
        exact = part.double()
        into.copy_(exact - exact.logsumexp(-1, keepdim=True))
    return _placed(out, value, dim)


def _log_softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    into_all = torch.empty_like(_rows(grad, dim), dtype=dtype)
    parts = (_rows(grad, dim), _rows(output, dim), into_all)
    for above, logs, into in zip(*(part.split(_ROWS) for part in parts), strict=True):
        exact = above.double()
        into.copy_(exact - logs.double().exp() * exact.sum(-1, keepdim=True))
    return _placed(into_all, grad, dim)


def train_in_fp32(model: Any, accelerator: Any) -> None:
    """Makes the weights fp32, the same numbers, and switches autocast off.

    The parameters stay the objects that an optimizer may hold by now.
    """
    model.float()
    accelerator.native_amp = False
