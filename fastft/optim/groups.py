"""A parameter group of AdamW: which hyper-parameters it may have, and what a step makes of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastft.optim.moment_codes import CODES

MOMENTS = ("fp32", "bf16", *CODES)


def check_group(group: dict[str, Any]) -> None:
    """Raises where hyper-parameters are no numbers, out of range or not implemented."""
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be either both numbers or both tensors, got {betas!r}")
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= _number(name, group[name]) < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {group[name]}")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0.0 <= _number(name, beta) < 1.0:
            raise ValueError(f"betas must both be in [0, 1), got {betas!r}")
    for name in ("amsgrad", "maximize", "capturable", "differentiable"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")
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


def _number(name: str, value: Any) -> float:
    """The value of a hyper-parameter; 0 of one on a device, for looking there would wait for it."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} as a tensor must have one element, got shape {tuple(value.shape)}"
        )
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return 0.0
    try:
        return float(value)
    except (OverflowError, RuntimeError):  # an integer of that size, a complex tensor
        raise ValueError(
            f"{name} must be a number that a float can be, got {value!r:.60}"
        ) from None
