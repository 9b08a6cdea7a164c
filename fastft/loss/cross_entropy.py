"""Cross-entropy over logits that exist.

What the loss of a row is, and its gradient, stands in `cross_entropy_rows`.

Kept for backward: the logits themselves, no copy, and on a CPU 16 bytes a row. Bytes moved: forward
reads the logits twice; backward reads them three times, on a CPU once, and writes their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastft.loss.cross_entropy_rows import ROWS, probability_losses
from fastft.loss.options import (
    RowOptions,
    check_indices,
    check_probabilities,
    check_reduction,
    check_tensors,
    check_weight,
    class_weights,
    reduce_losses,
    refuse_second_derivative,
    row_options,
    statistics_dtype,
)
from fastft.loss.vocab_parallel import Shard, sharded_losses

if TYPE_CHECKING:  # builds of torch without processes do not have it
    from torch.distributed import ProcessGroup


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: RowOptions,
        row_kernel: Callable[..., Any],
    ) -> Tensor:
        losses = logits.new_empty(len(logits), dtype=statistics_dtype(logits.dtype))
        weights = [] if weight is None else [weight]
        keeps = logits.device.type == "cpu" and ctx.needs_input_grad[0]
        sums = [logits.new_empty(len(logits), 2, dtype=torch.float64)] if keeps else []
        row_kernel(
            *(logits, target, weights, [], losses, torch.empty_like(losses), sums, []), *options
        )
        ctx.save_for_backward(logits, target, weight, *sums)
        ctx.options, ctx.row_kernel = options, row_kernel
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("cross_entropy")
        logits, target, weight, *sums = ctx.saved_tensors
        upstream = upstream.contiguous()
        losses, lse = torch.empty_like(upstream), torch.empty_like(upstream)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        weights = [] if weight is None else [weight]
        ctx.row_kernel(
            *(logits, target, weights, [upstream], losses, lse, sums, [grad]), *ctx.options
        )
        return grad, None, None, None, None


def _class_dim(input: Tensor) -> int:
    """Which dimension of logits holds the classes."""
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor of logits, got {input.dtype}")
    class_dim = min(1, input.dim() - 1)
    if class_dim < 0 or input.shape[class_dim] == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    return class_dim


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
        impl: "auto" (default), "eager", "cpp", "cuda" or "triton"; an explicit one never falls
            back.
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
    class_dim = _class_dim(input)
    shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    logits = input.movedim(class_dim, -1).reshape(-1, input.shape[class_dim])
    shard = Shard.of(logits.shape[1:], group, "class dimension of input", target, impl)
    classes = logits.shape[1] if shard is None else shard.classes
    check_weight(weight, classes, input.device)
    counted = None
    if target.is_floating_point():
        check_probabilities(target, input.shape, input.device, "input", impl)
        rows = target.movedim(class_dim, -1).reshape(-1, classes)
        losses = probability_losses(logits, rows, weight, options)
    else:
        counted = check_indices(target, input, class_dim, classes, ignore_index)
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        weight = class_weights(
            weight, counted, ignore_index, reduction, num_items, statistics_dtype(logits.dtype)
        )
        if shard is not None:
            losses = sharded_losses(logits, counted, weight, options, shard)
        else:
            row_kernel = ROWS.implementation(impl, logits.device, logits.dtype)
            losses = _CrossEntropy.apply(logits, counted, weight, options, row_kernel)
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
