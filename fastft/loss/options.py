"""What the losses have in common: their options, the checks at the door, and the reduction over
rows."""

from __future__ import annotations

import math
import operator
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import ops


class RowOptions(NamedTuple):
    """The options of the row operator, in the order of its schema; a softcap of 0 is none."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0


def row_options(
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> RowOptions:
    """The options of a public call, checked.

    Raises:
        TypeError: `ignore_index` is no integer.
        ValueError: `ignore_index` does not fit into int64, `label_smoothing` is not in [0, 1],
            `z_loss` is negative, or `softcap` or `logit_scale` is not positive and finite.
    """
    if not isinstance(ignore_index, int):
        if not hasattr(ignore_index, "__index__") or isinstance(ignore_index, Tensor):
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
        ignore_index = operator.index(ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into int64, got {ignore_index}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or positive and finite, got {softcap}")
    if not 0.0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be positive and finite, got {logit_scale}")
    return RowOptions(
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(softcap or 0.0),
        float(logit_scale),
    )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums over logits of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def unrounded(scale: Tensor) -> Tensor:
    """`scale` () as a product with a 16-bit tensor reads it in fp32.

    CUDA kernels round a scalar that is on the device to the tensor's dtype first, by up to 0.39 %
    in bf16; a vector of one takes part in the promotion. On a CPU products read the scalar as it
    is, and promotion would copy the tensor.
    """
    return scale if scale.dim() or scale.device.type == "cpu" else scale.reshape(1)


def times(tensor: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` times `scale`, () or a column, computed in fp32 and rounded once, to `dtype`."""
    return torch.mul(tensor, unrounded(scale), out=torch.empty_like(tensor, dtype=dtype))


def check_tensors(**arguments: Any) -> None:
    """Raises TypeError unless all arguments are dense tensors."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got the layout {value.layout}")


def check_device(name: str, tensor: Tensor, device: torch.device, other: str = "input") -> None:
    """Raises ValueError if `tensor` is on another device than `other`."""
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}, {other} on {device}; they must be on one device"
        )


def _may_look_at(tensor: Tensor) -> bool:
    """Whether a tensor's values may be checked: that would wait for a device, and break a compiled
    graph."""
    asked = tensor.device.type == "cpu" or bool(os.environ.get("FASTFT_CHECK_TARGETS"))
    return asked and not torch.compiler.is_compiling()


def check_probabilities(
    target: Tensor, shape: torch.Size, device: torch.device, label: str, impl: str
) -> None:
    """Raises if `target`, probabilities, is not of the shape or device of the logits, or asks for a
    gradient; or if `impl` is an engine, none of which takes probabilities."""
    check_plain_impl(impl, "target probabilities")
    check_device("target", target, device)
    if target.shape != shape:
        raise ValueError(
            f"target, as probabilities, must have the shape of {label}: {tuple(shape)}, got "
            f"{tuple(target.shape)}"
        )
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "target, as probabilities, must not require a gradient; torch.nn.functional's may"
        )


def check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    """Raises if `reduction` is unknown or `num_items` does not fit it, or is negative or not
    finite.

    A tensor on a device is looked at only where the environment variable FASTFT_CHECK_TARGETS is
    set.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items replaces the count of reduction='mean'; it cannot go with "
            f"reduction={reduction!r}"
        )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"num_items must be a number or a tensor of one, got shape {tuple(num_items.shape)}"
            )
        if not _may_look_at(num_items):
            return
    elif isinstance(num_items, bool) or not (
        isinstance(num_items, int | float) or hasattr(num_items, "__float__")
    ):
        raise TypeError(
            f"num_items must be a number or a tensor of one, got {type(num_items).__name__}"
        )
    if not 0 <= num_items < math.inf:
        raise ValueError(f"num_items must be finite and not negative, got {num_items}")


def compute_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the GEMMs: autocast's where it is on, as for `F.linear`; else the one that all
    operands share."""
    operands = {"input": input, "linear_weight": weight}
    if bias is not None:
        operands["linear_bias"] = bias
    check_tensors(**operands)
    for name, tensor in operands.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        check_device(name, tensor, input.device)
    device = input.device.type
    is_double = any(tensor.dtype == torch.float64 for tensor in operands.values())
    if torch.is_autocast_enabled(device) and not is_double:
        return torch.get_autocast_dtype(device)
    for name, tensor in operands.items():
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"{name} must have the dtype of input outside autocast: {tensor.dtype} and "
                f"{input.dtype}"
            )
    return input.dtype


def check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises if these are no hidden states (..., H) and head (V, H) with V >= 1, and bias (V,)."""
    if input.dim() < 1:
        raise ValueError("input must be (..., H), got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or len(weight) == 0:
        raise ValueError(
            f"linear_weight must be (V, H) with V >= 1 and the H of input: linear_weight is "
            f"{tuple(weight.shape)}, input is {tuple(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_bias must be (V,): linear_bias is {tuple(bias.shape)}, linear_weight is "
            f"{tuple(weight.shape)}"
        )


def check_indices(
    target: Tensor, input: Tensor, dim: int, classes: int, ignore_index: int
) -> Tensor:
    """`target`, flat and contiguous; raises if it is no integer tensor, is not as large as `input`
    without its dimension `dim`, or holds an index that is neither a class nor ignored.

    Indices on a device are looked at only where the environment variable FASTFT_CHECK_TARGETS is
    set; else the kernels see to them.
    """
    check_device("target", target, input.device)
    shape = input.shape[:dim] + input.shape[dim:][1:]
    if target.shape != shape:
        raise ValueError(
            f"target must have the shape of input without its dimension {dim}: input is "
            f"{tuple(input.shape)}, target is {tuple(target.shape)}, needed is {tuple(shape)}"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target must hold class indices of dtype int64 or int32, got {target.dtype}"
        )
    if _may_look_at(target):
        wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if wrong.any():
            position = tuple(wrong.nonzero()[0].tolist())
            place = f"target[{', '.join(map(str, position))}]" if position else "target"
            raise ValueError(
                f"{place} is {int(target[position])}; it must be in [0, {classes}) or equal "
                f"ignore_index={ignore_index}"
            )
    return target.reshape(-1).contiguous()


def check_weight(weight: Tensor | None, classes: int, device: torch.device) -> None:
    """Raises if `weight` is not one number per class, on the device of the logits."""
    if weight is None:
        return
    check_tensors(weight=weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a floating-point tensor, got {weight.dtype}")
    if weight.shape != (classes,):
        raise ValueError(
            f"weight must hold one number per class, shape ({classes},), got {tuple(weight.shape)}"
        )
    check_device("weight", weight, device, "the logits are")


def check_plain_impl(impl: str, what: str) -> None:
    """Raises if an engine is asked for that does not compute `what`."""
    ops.check_impl(impl)
    if impl not in ("auto", "eager"):
        raise RuntimeError(
            f"impl={impl!r} is not available for {what}: they are computed in plain torch"
        )


def class_weights(
    weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    num_items: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """`weight` as the row operator takes it, in `dtype`.

    The mean of weighted losses divides by the weights of the counted rows, but its z term by their
    number. With the weights scaled to an average of 1 over these rows, one division by the number
    does both.
    """
    if weight is None:
        return None
    weight = weight.detach().to(dtype).contiguous()
    if reduction == "mean" and num_items is None:
        counted = target != ignore_index
        index = torch.where(counted & (target >= 0) & (target < len(weight)), target, 0)
        weight = weight * (counted.sum() / (weight[index] * counted).sum())
    return weight


def reduce_losses(
    losses: Tensor,
    target: Tensor | None,
    reduction: str,
    ignore_index: int,
    num_items: float | Tensor | None,
) -> Tensor:
    """`losses`, of rows or their sum: as they are, their sum, or that divided by `num_items` or the
    counted rows.

    Without a `target` every row counts, and `losses` holds them all.
    """
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total if target is None else sum_of_counted(total, target != ignore_index)
    rows = torch.ones_like(losses, dtype=torch.bool) if target is None else target != ignore_index
    return total / divisor_of(rows, num_items, losses.dtype)


def sum_of_counted(total: Tensor, counted: Tensor) -> Tensor:
    """`total`, the sum over the rows that are `counted`; where none is its gradient is 0.

    Trainer divides it by the number of labels. In a step without any that is 0, and gradients that
    are known before backward would be 0 times infinity.
    """
    return torch.where(counted.any(), total, total.detach())


def divisor_of(counted: Tensor, num_items: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the mean divides its sum by, () in `dtype`: `num_items`, or how many of the rows are
    `counted`."""
    count = counted.sum()
    items = count if num_items is None else _items_beside(counted.device, num_items, dtype)
    # without a counted row the total is 0, and must stay 0 whatever the divisor
    return torch.where(count > 0, items, 1).to(dtype)


def _items_beside(device: torch.device, num_items: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The number on `device`: written there by a kernel, because a copy would wait for the
    device."""
    if isinstance(num_items, Tensor):
        if (
            num_items.device == device
            or num_items.device.type != "cpu"
            or torch.compiler.is_compiling()
        ):
            return num_items.to(device).reshape(())
        num_items = num_items.item()
    return torch.full((), num_items, dtype=dtype, device=device)


def refuse_second_derivative(what: str) -> None:
    """Called in backward: raises under `create_graph=True`, which would take the gradient for a
    constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{what} cannot be differentiated twice (create_graph=True); torch.nn.functional's can"
        )
