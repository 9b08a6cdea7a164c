"""Cross-entropy over logits that exist.

    z[t, v] = softcap * tanh(logit_scale * x[t, v] / softcap)               each step only if given
    lse[t]  = log sum_v exp(z[t, v])                p[t, v] = exp(z[t, v] - lse[t])
    loss[t] = (1 - e) w[y] (lse[t] - z[t, y]) + (e / V) sum_v w[v] (lse[t] - z[t, v]) + z_loss lse[t]^2
    dz[t, v] = ((1 - e) w[y] + (e / V) sum_u w[u] + 2 z_loss lse[t]) p[t, v] - (1 - e) w[y] (v == y) - (e / V) w[v]
    entropy[t] = -sum_v p[t, v] log p[t, v],    d entropy / dz[t, v] = -p[t, v] (log p[t, v] + entropy[t])

x are the logits (T, V), y the targets, e the label smoothing, w the class weights; smoothing and
weights as torch defines them, the z-loss as PaLM does (arXiv 2204.02311). A row whose target is
`ignore_index` has loss 0 and gradient 0. All maths is fp32 for 16-bit logits. Sums leave the target
out (`others`), and its gradient is -others / sum: a row whose target leads by 25 nats has a loss
and a gradient, where `1 - softmax` rounds both to zero. A row that holds NaN or +Inf is NaN, as
torch's.

Kept for backward: the logits themselves, no copy. Bytes moved: forward reads the logits twice
(maximum, sum), backward reads them three times and writes their gradient; all but the first read of
a row hit the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastft import ops
from fastft.loss.options import (
    RowOptions,
    check_device,
    check_plain_impl,
    check_probabilities,
    check_reduction,
    check_target,
    check_tensors,
    check_weight,
    class_weights,
    reduce_losses,
    refuse_second_derivative,
    row_options,
    statistics_dtype,
)

if TYPE_CHECKING:  # builds of torch without processes do not have it
    from torch.distributed import ProcessGroup

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_GPU_DTYPES = (*_CPU_DTYPES, torch.float16)


def capped(logits: Tensor, options: RowOptions) -> Tensor:
    """The logits after scale and softcap."""
    z = logits if options.logit_scale == 1.0 else logits * options.logit_scale
    return torch.tanh(z / options.softcap) * options.softcap if options.softcap else z


class _Rows(NamedTuple):
    """What the reference knows about its rows: matrices (T, V), columns (T, 1)."""

    z: Tensor
    distance: Tensor  # from the maximum, 0 where the exponential is 0
    exps: Tensor  # exp(z - maximum)
    others: Tensor  # their sum without the target's
    total: Tensor
    log_sum: Tensor
    lse: Tensor
    picked: Tensor  # the class of each target
    hits: Tensor  # (1 - label_smoothing) * weight of the target
    spread: float  # label_smoothing / V
    weight: Tensor | float
    weight_sum: Tensor | float


def _rows_of(
    logits: Tensor, index: Tensor, weight: Sequence[Tensor], options: RowOptions, dtype: torch.dtype
) -> _Rows:
    z = capped(logits.to(dtype), options)
    highest, target_logit = z.amax(1, keepdim=True), z.gather(1, index)
    exps = (z - highest).exp()
    target_exp = exps.gather(1, index)
    others = exps.scatter(1, index, 0.0).sum(1, keepdim=True)
    # log of the sum is log1p of the sum without the class that holds the maximum, whose exponential
    # is exactly 1
    log_sum = torch.where(target_logit == highest, others, others - 1 + target_exp).log1p()
    hit, spread = 1 - options.label_smoothing, options.label_smoothing / logits.shape[1]
    return _Rows(
        z,
        (z - highest).masked_fill_(exps == 0, 0.0),
        exps,
        others,
        others + target_exp,
        log_sum,
        highest + log_sum,
        index,
        weight[0].to(dtype)[index] * hit if weight else torch.full_like(log_sum, hit),
        spread,
        weight[0].to(dtype) if weight else 1.0,
        weight[0].sum(dtype=dtype) if weight else float(logits.shape[1]),
    )


def _losses_of(rows: _Rows, options: RowOptions) -> Tensor:
    highest = rows.z.amax(1, keepdim=True)
    losses = rows.hits * (highest - rows.z.gather(1, rows.picked) + rows.log_sum)
    if options.z_loss:  # 0 times Inf is NaN
        losses += options.z_loss * rows.lse.square()
    if rows.spread:
        below = ((highest - rows.z) * rows.weight).sum(1, keepdim=True)
        losses += rows.spread * (rows.weight_sum * rows.log_sum + below)
    return losses


def _gradient_of(
    rows: _Rows, entropy: Tensor, upstream: Sequence[Tensor], options: RowOptions
) -> Tensor:
    one, none = torch.ones_like(entropy), torch.zeros_like(entropy)
    of_loss, of_lse, of_entropy = (
        *(u[:, None].to(one.dtype) for u in upstream),
        *(one, none, none)[len(upstream) :],
    )
    softmax, spreads = rows.exps / rows.total, rows.spread * of_loss
    factor = spreads * rows.weight_sum + 2 * options.z_loss * of_loss * rows.lse + of_lse
    if len(upstream) > 1:
        factor = factor - of_entropy * (rows.distance - rows.log_sum + entropy)
    gradient = softmax * factor
    gradient += softmax.scatter(1, rows.picked, -rows.others / rows.total) * (rows.hits * of_loss)
    if rows.spread:
        gradient -= spreads * rows.weight
    gradient *= options.logit_scale
    if options.softcap:
        gradient *= 1 - (rows.z / options.softcap).square()
    return gradient


def _cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    weight: Sequence[Tensor],
    upstream: Sequence[Tensor],
    losses: Tensor,
    lse: Tensor,
    statistics: Sequence[Tensor],
    grad: Sequence[Tensor],
    *given: Any,
) -> None:
    options = RowOptions(*given)
    ignored = (target == options.ignore_index)[:, None]
    wrong = ((target < 0) | (target >= logits.shape[1]))[:, None] & ~ignored
    index = target.long()[:, None].masked_fill(ignored | wrong, 0)
    rows = _rows_of(logits, index, weight, options, losses.dtype)
    losses.copy_(
        _losses_of(rows, options).masked_fill_(ignored, 0.0).masked_fill_(wrong, torch.nan)[:, 0]
    )
    lse.copy_(rows.lse.masked_fill(ignored, 0.0)[:, 0])
    entropy = torch.zeros_like(rows.lse)
    if statistics or len(upstream) > 1:
        entropy = rows.log_sum - (rows.exps * rows.distance).sum(1, keepdim=True) / rows.total
    if statistics:
        statistics[0].copy_(entropy.masked_fill(ignored, 0.0)[:, 0])
        best = rows.z == rows.z.amax(1, keepdim=True)
        before = torch.arange(best.shape[1], device=best.device) < index
        first = best.gather(1, index) & ~(best & before).any(1, keepdim=True)
        statistics[1].copy_((first & ~ignored & ~wrong)[:, 0])
    if grad:
        gradient = _gradient_of(rows, entropy, upstream, options)
        grad[0].copy_(gradient.masked_fill_(ignored, 0.0).masked_fill_(wrong, torch.nan))


# weight, upstream, statistics and grad may be empty lists. weight: one vector, of the classes.
# upstream: the gradients of losses (1 where it is empty), or of losses, lse and entropy.
# statistics: entropy and is_top1, whether the target is the first maximum. grad: like the logits,
# or the logits themselves. Vectors over rows are fp32 (fp64 for fp64 logits).
ROWS = ops.Operator(
    "cross_entropy_rows(Tensor logits, Tensor target, Tensor[] weight, Tensor[] upstream, "
    "Tensor(a!) losses, "
    "Tensor(b!) lse, Tensor(c!)[] statistics, Tensor(d!)[] grad, int ignore_index, float "
    "label_smoothing, "
    "float z_loss, float softcap, float logit_scale) -> ()",
    _cross_entropy_rows,
    # cuda before triton: it has fewer instructions a logit (benchmarks/NOTES.md), until a GPU
    # decides
    engines={
        "cpp": ops.takes(*_CPU_DTYPES),
        "cuda": ops.takes(*_GPU_DTYPES),
        "triton": ops.takes(*_GPU_DTYPES),
    },
    samples={"float16 logits": (torch.float16,), "float64 logits": (torch.float64,)},
)


def rows_implementation(
    impl: str, logits_dtype: torch.dtype, device: torch.device
) -> Callable[..., Any]:
    """The function that computes `cross_entropy_rows` for logits of this dtype; raises as
    `Operator.resolve` does."""
    return ROWS.implementation(impl, device, logits_dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: RowOptions,
        rows: Callable[..., Any],
    ) -> Tensor:
        losses = logits.new_empty(len(logits), dtype=statistics_dtype(logits.dtype))
        weights = [] if weight is None else [weight]
        rows(logits, target, weights, [], losses, torch.empty_like(losses), [], [], *options)
        ctx.save_for_backward(logits, target, weight)
        ctx.options, ctx.rows = options, rows
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("cross_entropy")
        logits, target, weight = ctx.saved_tensors
        losses = torch.empty_like(upstream, memory_format=torch.contiguous_format)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        weights, upstreams = [] if weight is None else [weight], [upstream.contiguous()]
        ctx.rows(
            logits,
            target,
            weights,
            upstreams,
            losses,
            torch.empty_like(losses),
            [],
            [grad],
            *ctx.options,
        )
        return grad, None, None, None, None


def probability_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions
) -> Tensor:
    """The losses (T,) of logits (T, V) and target probabilities (T, V), in plain torch."""
    z = capped(logits.to(statistics_dtype(logits.dtype)), options)
    weight = None if weight is None else weight.to(z.dtype)
    smoothing = options.label_smoothing
    losses = F.cross_entropy(
        z, target.to(z.dtype), weight, reduction="none", label_smoothing=smoothing
    )
    return losses + options.z_loss * z.logsumexp(1).square() if options.z_loss else losses


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`, with more options; never changes its input.

    Args:
        input: logits, floating point: (T, V), (V,) or (T, V, d1, ...) with the classes in dimension
            1.
        target: class indices in [0, V) or `ignore_index`, int64 or int32: `input`'s shape without
            the classes. Or probabilities: floating point, of `input`'s shape, without a gradient;
            they are computed in plain torch.
        weight: of the classes, (V,), floating point; None (default): all 1.
        reduction: "mean" (default; over the rows that are not ignored, by their weights), "sum" or
            "none".
        ignore_index: rows with this target have loss 0, gradient 0, and do not count. Default -100.
        label_smoothing: in [0, 1]; default 0.
        softcap: logits become `softcap * tanh(logits / softcap)`; None (default): they stay.
        logit_scale: multiplies the logits, before the softcap; default 1.
        z_loss: adds `z_loss * lse^2`, which class weights do not weigh; default 0.
        num_items: what "mean" divides the sum by instead of the count, a number or a tensor of one
            element, such as Trainer's `num_items_in_batch`.
        impl: "auto" (default), "eager" or "cpp"; an explicit one never falls back.
        group: processes over which the classes are spread, V / n on each, in the order of the
            group. Then `input` holds this process's classes; `target` (of all V classes), `weight`
            (V,) and the options must be the same on all of them, and so is the loss. Class indices
            only; in plain torch; a graph break under `torch.compile`. None (default): one process
            has all classes.

    Returns:
        A scalar, or the losses in `target`'s shape (without the classes) for "none"; fp32 for
        16-bit logits (torch: 16 bits), else in `input`'s dtype. The mean over no row at all is 0
        (torch: NaN).

    Raises:
        TypeError: `input` or `weight` is no floating-point tensor, `ignore_index` no integer,
            `target` has no indices, or `group` is no process group.
        ValueError: shapes or devices do not fit, a target is out of range (checked on the CPU;
            elsewhere its row is NaN, unless the environment variable FASTFT_CHECK_TARGETS is set),
            an option is out of range or unknown, `num_items` is negative, not finite or goes with
            another reduction, target probabilities require a gradient; processes of a `group` have
            different numbers of classes or this process is not in it.
        RuntimeError: the engine asked for is not available here (says why), or backward runs with
            `create_graph=True`.
    """
    check_tensors(input=input, target=target)
    check_reduction(reduction, num_items)
    options = row_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor of logits, got {input.dtype}")
    class_dim = min(1, input.dim() - 1)
    if class_dim < 0 or input.shape[class_dim] == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    classes = input.shape[class_dim]
    shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    shard = None
    if group is not None:
        from fastft.loss.vocab_parallel import Shard, sharded_losses  # which is built on this room

        shard = Shard.of((classes,), group, "class dimension of input", target, impl)
        classes = shard.classes
    check_weight(weight, classes, input.device)
    logits = input.movedim(class_dim, -1).reshape(-1, input.shape[class_dim])
    if target.is_floating_point():
        check_probabilities(target, input.shape, input.device, "input")
        check_plain_impl(impl, "target probabilities")
        losses = probability_losses(
            logits, target.movedim(class_dim, -1).reshape(-1, classes), weight, options
        )
        counted = None
    else:
        check_device("target", target, input.device)
        if target.shape != shape:
            raise ValueError(
                f"target must have the shape of input without its class dimension: input is "
                f"{tuple(input.shape)}, "
                f"target is {tuple(target.shape)}"
            )
        check_target(target, classes, ignore_index)
        counted = target.reshape(-1).contiguous()
        scaled = class_weights(
            weight, counted, ignore_index, reduction, num_items, statistics_dtype(logits.dtype)
        )
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        if shard is not None:
            losses = sharded_losses(logits, counted, scaled, options, shard)
        else:
            rows = rows_implementation(impl, logits.dtype, logits.device)
            losses = _CrossEntropy.apply(logits, counted, scaled, options, rows)
    reduced = reduce_losses(losses, counted, reduction, ignore_index, num_items)
    return reduced.view(shape) if reduction == "none" else reduced


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` on `fastft.cross_entropy`, which documents the arguments and the
    shapes."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_reduction(reduction, None)
        row_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = (
            ignore_index,
            reduction,
            label_smoothing,
        )
        self.softcap, self.logit_scale, self.z_loss, self.impl = softcap, logit_scale, z_loss, impl

    def forward(
        self, input: Tensor, target: Tensor, num_items: float | Tensor | None = None
    ) -> Tensor:
        """The loss of `input` and `target`; `num_items` as in `cross_entropy`."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            num_items=num_items,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """What torch prints inside the parentheses."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
