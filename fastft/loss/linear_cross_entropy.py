"""Cross-entropy of a linear head, without ever holding its logits.

    loss[t] = lse(z[t]) - z[t, y[t]],   z = x W^T + b,   dz[t] = softmax(z[t]) - onehot(y[t])
    dx = dz W,   dW = dz^T x,   db = sum_t dz[t]

x are the hidden states (T, H), W the head (V, H), y the targets. The rows that count go through one reused workspace
of R rows: logits by GEMM, the row kernel of `cross_entropy` turns them into dz in place, two GEMMs take dx and dW out
of it. Which GEMMs run:

    trainable head, sum or mean   forward 6THV                    gradients computed in forward, scaled in backward
    frozen head                   forward 4THV                    each row of dx waits for its own upstream gradient
    head alone                    forward 4THV
    trainable head, none          forward 2THV, backward 6THV     dW needs every upstream gradient first
    nothing needs a gradient      forward 2THV

T counts rows that are not ignored. dz is stored unnormalised, within [-1, 1], in the dtype of the logits; what scales
it, the upstream gradient and 1 / count, is applied in fp32. dW adds up in fp32 and is rounded once.

Kept for backward: dx (T H, dtype of x) and dW (V H, fp32, or the dtype of W where one chunk holds all rows). Bytes
moved besides the GEMMs' operands: for each chunk, 4 passes over the workspace (R V) and 2 over dW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft.loss.cross_entropy import (
    check_reduction,
    check_target,
    reduce_losses,
    refuse_second_derivative,
    rows_implementation,
    statistics_dtype,
)

# bytes of the logits workspace: on the CPU it should stay near the last-level cache, on a GPU GEMMs want >= 1024 rows
_WORKSPACE_BYTES = {"cpu": 32 << 20}
_DEVICE_WORKSPACE_BYTES = 512 << 20


class _Head(NamedTuple):
    """The operands of one call, cast to the dtype of the computation; `input` is (T, H), `target` (T,)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    rows: Callable[..., Any]


class _Sweep(NamedTuple):
    losses: Tensor
    d_input: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None


def chunk_rows(count: int, classes: int, itemsize: int, device: torch.device) -> int:
    """How many rows go through the workspace at once: as many as its budget holds, evenly spread over the chunks."""
    budget = _WORKSPACE_BYTES.get(device.type, _DEVICE_WORKSPACE_BYTES)
    most = max(1, budget // (classes * itemsize))
    chunks = math.ceil(count / most)
    return math.ceil(count / chunks) if chunks else 0


def _counted_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """The positions of the rows that count; None for all of them, and where counting would wait for the device."""
    if target.device.type != "cpu":
        return None
    counted = target != ignore_index
    return None if counted.all() else counted.nonzero()[:, 0]


class _WeightGradient:
    """Adds up dW = dz^T x over the chunks: in fp32, or in the dtype of the operands where there is one chunk."""

    def __init__(self, weight: Tensor, chunks: int, workspace: Tensor) -> None:
        self.direct = chunks <= 1 or statistics_dtype(weight.dtype) == weight.dtype
        dtype = weight.dtype if self.direct else statistics_dtype(weight.dtype)
        self.sum = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.empty = True
        if not self.direct:  # ATen has no 16-bit GEMM that adds to fp32 on the CPU: slabs of it go through a buffer
            slab = max(1, min(weight.shape[0], workspace.numel() // (4 * weight.shape[1]) or 1))
            self.slab = torch.empty((slab, weight.shape[1]), dtype=weight.dtype, device=weight.device)

    def add(self, dz: Tensor, x: Tensor) -> None:
        if self.direct:
            torch.mm(dz.T, x, out=self.sum) if self.empty else self.sum.addmm_(dz.T, x)
        else:
            for begin in range(0, len(self.sum), len(self.slab)):
                part = self.sum[begin : begin + len(self.slab)]
                product = torch.mm(dz[:, begin : begin + len(part)].T, x, out=self.slab[: len(part)])
                part.copy_(product) if self.empty else part.add_(product)
        self.empty = False


def _sweep(head: _Head, needs: tuple[bool, bool, bool], row_scale: Tensor | None = None) -> _Sweep:
    """One pass over the rows that count: their losses and the gradients that `needs` (of input, weight, bias) asks for.

    `row_scale` (T,) multiplies the gradient of each row; without it gradients are unnormalised.
    """
    x, weight, classes = head.input, head.weight, head.weight.shape[0]
    positions = _counted_rows(head.target, head.ignore_index)
    count = len(x) if positions is None else len(positions)
    step = chunk_rows(count, classes, x.element_size(), x.device)
    sums = statistics_dtype(x.dtype)
    losses = torch.zeros(len(x), dtype=sums, device=x.device)
    d_input = (torch.empty_like if positions is None else torch.zeros_like)(x) if needs[0] else None
    d_bias = torch.zeros(classes, dtype=sums, device=x.device) if needs[2] else None
    workspace = x.new_empty((step, classes))
    if count == 0:
        return _Sweep(losses, d_input, torch.zeros_like(weight) if needs[1] else None, d_bias)
    d_weight = _WeightGradient(weight, math.ceil(count / step), workspace) if needs[1] else None
    for begin in range(0, count, step):
        chunk = slice(begin, min(begin + step, count))
        where = chunk if positions is None else positions[chunk]
        x_rows, z = x[where], workspace[: chunk.stop - begin]
        if head.bias is None:
            torch.mm(x_rows, weight.T, out=z)
        else:
            torch.addmm(head.bias, x_rows, weight.T, out=z)
        row_losses = losses.new_empty(len(z))
        scale = [] if row_scale is None else [row_scale[where]]
        grad = [z] if any(needs) else []
        head.rows(z, head.target[where], row_losses, torch.empty_like(row_losses), grad, scale, head.ignore_index)
        losses[where] = row_losses
        if d_input is not None and positions is None:
            torch.mm(z, weight, out=d_input[where])
        elif d_input is not None:
            d_input[where] = torch.mm(z, weight)
        if d_weight is not None:
            d_weight.add(z, x_rows)
        if d_bias is not None:
            d_bias += z.sum(0)
    return _Sweep(losses, d_input, None if d_weight is None else d_weight.sum, d_bias)


def _graph_is_kept() -> bool:
    """Whether the running backward may be followed by another over the same graph; True where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`gradient` times `scale` in fp32, rounded once to `dtype`; in place where nobody can ask for it again."""
    if gradient is None:
        return None
    in_place = gradient.dtype == dtype and not _graph_is_kept()  # saves a second (V, H) and its page faults
    return torch.mul(gradient, scale, out=gradient if in_place else torch.empty_like(gradient, dtype=dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    """The losses' sum (with `rowwise`, the losses) of a head; its gradients are described at the top of the file."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rowwise: bool,
        dtype: torch.dtype,
        ignore_index: int,
        rows: Callable[..., Any],
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        head = _cast_head(input, weight, bias, target, dtype, ignore_index, rows)
        ctx.rowwise, ctx.needs, ctx.call = rowwise, needs, (dtype, ignore_index, rows)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (input, weight, bias))
        ctx.recompute = rowwise and any(needs[1:])
        sweep = _sweep(head, (False, False, False) if ctx.recompute else needs)
        ctx.save_for_backward(*((input, weight, bias, target) if ctx.recompute else sweep[1:]))
        return sweep.losses if rowwise else sweep.losses.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        if ctx.recompute:
            sweep = _sweep(_cast_head(*ctx.saved_tensors, *ctx.call), ctx.needs, upstream.contiguous())
            gradients = (None if g is None else g.to(d) for g, d in zip(sweep[1:], ctx.dtypes, strict=True))
        else:
            scale = upstream[:, None] if ctx.rowwise else upstream
            gradients = (_scaled(g, scale, d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return (*gradients, None, None, None, None, None)


def _cast_head(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    rows: Callable[..., Any],
) -> _Head:
    bias = None if bias is None else bias.to(dtype)
    return _Head(input.to(dtype), weight.to(dtype), bias, target, ignore_index, rows)


def _compute_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the GEMMs: autocast's where it is on, as for `F.linear`; else the one that all operands share."""
    operands = {"input": input, "linear_weight": weight, **({} if bias is None else {"linear_bias": bias})}
    for name, tensor in operands.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, input on {input.device}; they must be on one device")
    device = input.device.type
    if torch.is_autocast_enabled(device) and all(t.dtype != torch.float64 for t in operands.values()):
        return torch.get_autocast_dtype(device)
    for name, tensor in operands.items():
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name} must have the dtype of input outside autocast: {tensor.dtype} and {input.dtype}")
    return input.dtype


def _check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    def complain(name: str, tensor: Tensor, rule: str, other: str, shape: torch.Size) -> None:
        raise ValueError(f"{name} must be {rule}: {name} is {tuple(tensor.shape)}, {other} is {tuple(shape)}")

    if input.dim() < 1:
        raise ValueError("input must be (..., H), got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or len(weight) == 0:
        complain("linear_weight", weight, "(V, H) with V >= 1 and the H of input", "input", input.shape)
    if bias is not None and bias.shape != weight.shape[:1]:
        complain("linear_bias", bias, "(V,)", "linear_weight", weight.shape)
    if target.shape != input.shape[:-1]:
        complain("target", target, "of input's shape without its last dimension", "input", input.shape)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of `linear(input, linear_weight, linear_bias)`, without ever holding these logits.

    `torch.nn.functional.linear_cross_entropy` with class indices. The workspace is at most 32 MB on the CPU (one row,
    where a row is larger). Obeys autocast as `F.linear` does. Changes no input; works under gradient checkpointing; a
    retained graph gives the same gradients again; differentiating twice raises.

    Args:
        input: hidden states (..., H), floating point.
        linear_weight: the head's weight (V, H), `input`'s dtype unless autocast is on.
        target: class indices in [0, V) or `ignore_index`, int64 or int32, of shape (...).
        linear_bias: the head's bias (V,), or None (default).
        reduction: "mean" (default; over the rows that are not ignored), "sum" or "none".
        ignore_index: rows with this target cost nothing, have loss 0 and gradient 0, and do not count. Default -100.
        num_items: what "mean" divides the sum by instead of the count, a number or a tensor of one element, such as
            Trainer's `num_items_in_batch`.
        impl: how the rows are computed: "auto" (default), "eager" or "cpp"; an explicit one never falls back.

    Returns:
        A scalar, or the losses in `target`'s shape for "none"; fp32 for 16-bit operands (torch: 16 bits). The mean
        over no row at all is 0 with zero gradients (torch: NaN). Gradients have the dtypes of their tensors.

    Raises:
        TypeError: operands are not floating point or differ in dtype, or `target` holds no indices.
        ValueError: shapes or devices do not fit, a target is out of range (checked on the CPU only), `reduction` or
            `impl` is unknown, `num_items` is negative or goes with another reduction.
        RuntimeError: the engine asked for is not available here (says why), or backward runs with `create_graph=True`.
    """
    check_reduction(reduction, num_items)
    dtype = _compute_dtype(input, linear_weight, linear_bias)
    _check_shapes(input, linear_weight, linear_bias, target)
    check_target(target, len(linear_weight), ignore_index)
    rows = rows_implementation(impl, dtype, input.device)
    flat_target = target.reshape(-1).contiguous()
    flat_input = input.reshape(-1, input.shape[-1])
    with torch.autocast(input.device.type, enabled=False):
        operands, call = (flat_input, linear_weight, linear_bias, flat_target), (dtype, ignore_index, rows)
        if torch.is_grad_enabled():
            losses = _LinearCrossEntropy.apply(*operands, reduction == "none", *call)
        else:  # needs_input_grad does not know about no_grad
            losses = _sweep(_cast_head(*operands, *call), (False, False, False)).losses
        reduced = reduce_losses(losses, flat_target, reduction, ignore_index, num_items)
    return reduced.view(target.shape) if reduction == "none" else reduced


class LinearCrossEntropyLoss(nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` on `fastft.linear_cross_entropy`: a head (`linear`) and its loss.

    Args:
        in_features: H.
        num_classes: V.
        bias: whether the head has one; default no.
        device: of the head's parameters.
        dtype: of the head's parameters.
        reduction: as in `linear_cross_entropy`.
        ignore_index: as in `linear_cross_entropy`.
        impl: as in `linear_cross_entropy`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_reduction(reduction, None)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.reduction, self.ignore_index, self.impl = reduction, ignore_index, impl

    def forward(self, input: Tensor, target: Tensor, num_items: float | Tensor | None = None) -> Tensor:
        """The loss of hidden states `input` (..., H) and `target` (...); `num_items` as in `linear_cross_entropy`."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            num_items=num_items,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """What torch prints inside the parentheses."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
