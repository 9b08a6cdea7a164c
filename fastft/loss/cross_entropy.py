"""Cross-entropy over logits that exist.

    loss[t] = lse[t] - z[t, y[t]],   lse[t] = log sum_v exp(z[t, v]),   dz[t, v] = softmax(z[t])[v] - (v == y[t])

z are the logits (T, V), y the targets; a row whose target is `ignore_index` has loss 0 and gradient 0. All maths is
fp32 for 16-bit logits. Sums leave the target out (`others`), and its gradient is -others / sum: a row whose target
leads by 25 nats has a loss and a gradient, where `1 - softmax` rounds both to zero. A row that holds NaN or +Inf is
NaN, as torch's.

Kept for backward: the logits themselves, no copy. Bytes moved: forward reads the logits twice (maximum, sum), backward
reads them three times and writes their gradient; all but the first read of a row hit the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft import ops

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def _cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    losses: Tensor,
    lse: Tensor,
    grad: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    ignore_index: int,
) -> None:
    ignored = (target == ignore_index)[:, None]
    index = target.long()[:, None].masked_fill(ignored, 0)
    z = logits.to(losses.dtype)
    highest, target_logit = z.amax(1, keepdim=True), z.gather(1, index)
    exps = (z - highest).exp_()
    target_exp = exps.gather(1, index)
    others = exps.scatter_(1, index, 0.0).sum(1, keepdim=True)
    # log of the sum is log1p of the sum without the class that holds the maximum, whose exponential is exactly 1
    log_sum = torch.where(target_logit == highest, others, others - 1 + target_exp).log1p()
    losses.copy_((highest - target_logit + log_sum).masked_fill_(ignored, 0.0)[:, 0])
    lse.copy_((highest + log_sum).masked_fill_(ignored, 0.0)[:, 0])
    for out in grad:
        total = others + target_exp
        softmax = exps.div_(total).scatter_(1, index, -others / total)
        if row_scale:
            softmax.mul_(row_scale[0][:, None])
        out.copy_(softmax.masked_fill_(ignored, 0.0))


# grad is empty, or one tensor like logits (or logits themselves) that receives softmax - onehot times row_scale;
# losses, lse and row_scale, which may be left out, are fp32 (fp64 for fp64 logits), one element a row
ROWS = ops.Operator(
    "cross_entropy_rows(Tensor logits, Tensor target, Tensor(a!) losses, Tensor(b!) lse, Tensor(c!)[] grad, "
    "Tensor[] row_scale, int ignore_index) -> ()",
    _cross_entropy_rows,
    engines=("cpp", "cuda", "triton"),
)


def rows_implementation(impl: str, logits_dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """The function that computes `cross_entropy_rows` for logits of this dtype; raises as `Operator.resolve` does."""
    engine = ROWS.resolve(impl, device)
    if engine == "cpp" and logits_dtype not in _NATIVE_DTYPES:
        if impl == "cpp":
            raise RuntimeError(f"impl='cpp' is not available for {ROWS.name}: it has no kernel for {logits_dtype}")
        engine = "eager"
    return ROWS.reference if engine == "eager" else ROWS.native


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums over logits of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises if `target` is no integer tensor or, on the CPU, holds an index that is neither a class nor ignored."""
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target must hold class indices of dtype int64 or int32, got {target.dtype}")
    if target.device.type != "cpu":
        return  # looking at the values would wait for the device
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        place = f"target[{', '.join(map(str, position))}]" if position else "target"
        value = int(target[position])
        raise ValueError(f"{place} is {value}; it must be in [0, {classes}) or equal ignore_index={ignore_index}")


def check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    """Raises if `reduction` is unknown or `num_items` does not fit it."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items replaces the count of reduction='mean'; it cannot go with reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be a number or a tensor of one, got shape {tuple(num_items.shape)}")
    elif num_items < 0:
        raise ValueError(f"num_items must not be negative, got {num_items}")


def reduce_losses(
    losses: Tensor, target: Tensor, reduction: str, ignore_index: int, num_items: float | Tensor | None
) -> Tensor:
    """`losses` (T,) as they are, their sum, or that divided by `num_items` or the counted rows; 0 where none counts."""
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    counted = (target != ignore_index).sum()
    items = counted if num_items is None else torch.as_tensor(num_items, device=losses.device).reshape(())
    # without a counted row the total is 0, and must stay 0 whatever the divisor
    return total / torch.where(counted > 0, items, 1).to(losses.dtype)


def refuse_second_derivative(what: str) -> None:
    """Called in backward: raises under `create_graph=True`, which would take the gradient for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} cannot be differentiated twice (create_graph=True); torch.nn.functional's can")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, rows: Callable[..., Any]) -> Tensor:
        losses = logits.new_empty(len(logits), dtype=statistics_dtype(logits.dtype))
        rows(logits, target, losses, torch.empty_like(losses), [], [], ignore_index)
        ctx.save_for_backward(logits, target)
        ctx.ignore_index, ctx.rows = ignore_index, rows
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative("cross_entropy")
        logits, target = ctx.saved_tensors
        losses = torch.empty_like(upstream, memory_format=torch.contiguous_format)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.rows(logits, target, losses, torch.empty_like(losses), [grad], [upstream.contiguous()], ctx.ignore_index)
        return grad, None, None, None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.cross_entropy` with class indices; never changes its input.

    Args:
        input: logits, floating point: (T, V), (V,) or (T, V, d1, ...) with the classes in dimension 1.
        target: class indices in [0, V) or `ignore_index`, int64 or int32: `input`'s shape without the classes.
        reduction: "mean" (default; over the rows that are not ignored), "sum" or "none".
        ignore_index: rows with this target have loss 0, gradient 0, and do not count. Default -100.
        num_items: what "mean" divides the sum by instead of the count, a number or a tensor of one element, such as
            Trainer's `num_items_in_batch`.
        impl: "auto" (default), "eager" or "cpp"; an explicit one never falls back.

    Returns:
        A scalar, or the losses in `target`'s shape for "none"; fp32 for 16-bit logits (torch: 16 bits), else in
        `input`'s dtype. The mean over no row at all is 0 (torch: NaN).

    Raises:
        TypeError: `input` is not floating point, or `target` holds no indices.
        ValueError: shapes do not fit, a target is out of range (checked on the CPU only), `reduction` or `impl` is
            unknown, `num_items` is negative or goes with another reduction.
        RuntimeError: the engine asked for is not available here (says why), or backward runs with `create_graph=True`.
    """
    check_reduction(reduction, num_items)
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor of logits, got {input.dtype}")
    class_dim = min(1, input.dim() - 1)
    if class_dim < 0 or target.shape != input.shape[:class_dim] + input.shape[class_dim + 1 :]:
        raise ValueError(
            f"target must have the shape of input without its class dimension: input is {tuple(input.shape)}, "
            f"target is {tuple(target.shape)}"
        )
    if input.shape[class_dim] == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    check_target(target, input.shape[class_dim], ignore_index)
    logits = input.movedim(class_dim, -1).flatten(0, -2) if input.dim() > 1 else input[None]
    flat_target = target.reshape(-1).contiguous()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows = rows_implementation(impl, logits.dtype, logits.device)
    losses = _CrossEntropy.apply(logits, flat_target, ignore_index, rows)
    reduced = reduce_losses(losses, flat_target, reduction, ignore_index, num_items)
    return reduced.view(target.shape) if reduction == "none" else reduced


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` on `fastft.cross_entropy`, which documents the arguments and the shapes."""

    def __init__(self, ignore_index: int = -100, reduction: str = "mean", *, impl: str = "auto") -> None:
        super().__init__()
        check_reduction(reduction, None)
        self.ignore_index, self.reduction, self.impl = ignore_index, reduction, impl

    def forward(self, input: Tensor, target: Tensor, num_items: float | Tensor | None = None) -> Tensor:
        """The loss of `input` and `target`; `num_items` as in `cross_entropy`."""
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "reduction": self.reduction, "impl": self.impl}
        return cross_entropy(input, target, num_items=num_items, **options)

    def extra_repr(self) -> str:
        """What torch prints inside the parentheses."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
