"""A parameter group of AdamW: which hyper-parameters it may have, and what a step makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.checks import boolean
from fastft.optim.moment_codes import CODES

MOMENTS = ("fp32", "bf16", *CODES)
FLAGS = ("amsgrad", "maximize", "capturable", "differentiable")


def check_group(group: dict[str, Any]) -> None:
    """Raises where hyper-parameters are no numbers, out of range or not implemented."""
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be either both numbers or both tensors, got {betas!r}")
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= number(name, group[name]) < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {group[name]}")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0.0 <= number(name, beta) < 1.0:
            raise ValueError(f"betas must both be in [0, 1), got {betas!r}")
    for name in FLAGS:
        boolean(name, group[name])
    if group["differentiable"]:
        raise ValueError(
            "differentiable=True is not implemented by fastft's AdamW; use torch.optim.AdamW for it"
        )
    if group["moments"] not in MOMENTS:
        raise ValueError(
            f"moments must be one of {', '.join(map(repr, MOMENTS))}, got {group['moments']!r}"
        )
    check_amsgrad(group)
    seed = group["seed"]
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an integer or None, got {seed!r}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")


def check_amsgrad(group: dict[str, Any]) -> None:
    """Raises where amsgrad, which a group may get at any time, meets moments that are codes."""
    moments = group["moments"]
    if moments in CODES and group["amsgrad"]:
        raise ValueError(
            f'amsgrad with moments="{moments}" is not implemented: a maximum of rounded values '
            "only grows"
        )


def hyper_row(group: dict[str, Any], step: float) -> list[float]:
    """A row of the operator's hyper table, computed in double precision, as torch does."""
    lr, decay, eps = (float(group[name]) for name in ("lr", "weight_decay", "eps"))
    beta1, beta2 = map(float, group["betas"])
    sign = -1.0 if group["maximize"] else 1.0
    return [*hyper_columns(lr, decay, eps, beta1, beta2, sign, step), step]


def hyper_columns(
    lr: Any, weight_decay: Any, eps: Any, beta1: Any, beta2: Any, sign: Any, step: Any
) -> list[Any]:
    """The hyper table's columns but for the last, the step: of floats, or of float64 tensors."""
    return [
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        -(lr / (1 - beta1**step)),
        (1 - beta2**step) ** 0.5,
        eps,
        sign,
    ]


def check_max_grad_norm(value: Any) -> None:
    """Raises where `value` is no norm to clip to; infinity is one, which scales nothing."""
    if value is None:
        return
    needed = "must be a number above 0, or None for no clipping"
    if not number("max_grad_norm", value, needed, elsewhere=1.0) > 0:
        raise ValueError(f"max_grad_norm {needed}, got {value!r}")


def number(
    name: str, value: Any, needed: str = "must be a number", *, elsewhere: float = 0.0
) -> float:
    """The value of a hyper-parameter; `elsewhere` of a tensor on a device, for looking there would
    wait for it.

    Raises:
        TypeError: it is no real number.
        ValueError: it is a tensor of several, or an integer that no float can be.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} {needed}, got {value!r}")
        try:
            return float(value)
        except OverflowError:
            message = f"{name} must be a number that a float can be, got {value!r:.60}"
            raise ValueError(message) from None
    if value.numel() != 1:
        raise ValueError(
            f"{name} as a tensor must have one element, got shape {tuple(value.shape)}"
        )
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} {needed}, got a tensor of {value.dtype}")
    return elsewhere if value.device.type != "cpu" else float(value)
