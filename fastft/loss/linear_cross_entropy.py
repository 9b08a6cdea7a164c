"""Cross-entropy of a linear layer: the loss of logits x W^T + b that are never held as a whole.

    loss = sum over rows of cross_entropy(x W^T + b), or its mean, or the rows

x are the hidden states (T, H), W the head (V, H). What a row's loss is stands in
`cross_entropy_rows`, how rows go through the head in `head_sweep`, what is kept for backward and
which bytes are moved in `linear_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastft.loss.cross_entropy_rows import probability_losses
from fastft.loss.dtensor_head import local_head
from fastft.loss.head_sweep import HeadCall, Operands
from fastft.loss.linear_rows import divides_rows, linear_rows
from fastft.loss.options import (
    check_indices,
    check_probabilities,
    check_reduction,
    check_shapes,
    check_tensors,
    check_weight,
    class_weights,
    compute_dtype,
    divisor_of,
    reduce_losses,
    row_options,
    statistics_dtype,
)
from fastft.loss.row_functions import apply_to_rows
from fastft.loss.vocab_parallel import Shard, vocab_parallel_losses
from fastft.loss.weight_grad import check_accumulates, sum_into_grad

if TYPE_CHECKING:  # builds of torch without processes do not have it
    from torch.distributed import ProcessGroup


def _of_probabilities(
    operands: Operands,
    target: Tensor,
    weight: Tensor | None,
    call: HeadCall,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    """The reduced loss of target probabilities (..., V), in plain torch."""
    x, head, bias = (None if tensor is None else tensor.to(call.dtype) for tensor in operands)
    assert x is not None and head is not None
    rows = target.reshape(-1, target.shape[-1])

    def losses_of(z: Tensor, probabilities: Tensor) -> Tensor:
        losses = probability_losses(z, probabilities, weight, call.options)
        return losses.sum() if call.summed else losses

    losses = apply_to_rows([[(x, head, bias)]], losses_of, rows, summed=call.summed)
    every = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
    return reduce_losses(losses, every, reduction, -1, num_items)


def _of_indices(
    operands: Operands,
    target: Tensor,
    weight: Tensor | None,
    call: HeadCall,
    reduction: str,
    num_items: float | Tensor | None,
    *,
    shard: Shard | None,
    accumulate: bool,
) -> Tensor:
    """The reduced loss of class indices (T,)."""
    ignore_index, dtype, divisor = call.options.ignore_index, statistics_dtype(call.dtype), None
    weight = class_weights(weight, target, ignore_index, reduction, num_items, dtype)
    if shard is None and reduction == "mean" and divides_rows(call.dtype, target.device):
        divisor = divisor_of(target != ignore_index, num_items, dtype)
    if shard is not None:
        losses = vocab_parallel_losses(operands, target, weight, call, shard)
    elif accumulate:
        losses = sum_into_grad(operands, target, weight, call, divisor)
    else:
        losses, *_ = linear_rows(operands, target, weight, call, divisor)
    if divisor is not None:
        return losses  # their mean
    return reduce_losses(losses, target, reduction, ignore_index, num_items)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    num_items: float | Tensor | None = None,
    chunk_rows: int | None = None,
    max_counted: int | None = None,
    accumulate_weight_grad: bool = False,
    impl: str = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy of `linear(input, linear_weight, linear_bias)`, without ever holding these
    logits.

    `torch.nn.functional.linear_cross_entropy` with more options. The workspace is at most 32 MB on
    the CPU, or 256 rows of logits where these are larger, or up to 512 that take no more than the
    weight's gradient; on a GPU 512 MB, or as much as that takes, or 1024 rows. Obeys autocast as
    `F.linear` does. Changes no input; works under gradient checkpointing and
    `torch.compile(fullgraph=True)`; a retained graph gives the same gradients again;
    differentiating twice raises.

    Args:
        input: hidden states (..., H), floating point.
        linear_weight: the head's weight (V, H), `input`'s dtype unless autocast is on.
        target: class indices in [0, V) or `ignore_index`, int64 or int32, of shape (...). Or
            probabilities (..., V), floating point, without a gradient; they are computed in chunks
            of plain torch.
        linear_bias: the head's bias (V,), or None (default).
        weight: of the classes, (V,), floating point; None (default): all 1.
        reduction: "mean" (default; over the rows that are not ignored, by their weights), "sum" or
            "none".
        ignore_index: rows with this target have loss 0 and gradient 0, do not count, and cost
            nothing on the CPU (for other devices see `max_counted`). Default -100.
        label_smoothing: in [0, 1]; default 0.
        softcap: logits become `softcap * tanh(logits / softcap)`; None (default): they stay.
        logit_scale: multiplies the logits, before the softcap; default 1.
        z_loss: adds `z_loss * lse^2`, which class weights do not weigh; default 0.
        num_items: what "mean" divides the sum by instead of the count, a number or a tensor of one
            element, such as Trainer's `num_items_in_batch`.
        chunk_rows: rows that go through the workspace at once; None (default): planned from the
            shapes alone.
        max_counted: an upper bound of the rows that are not ignored, if the host knows one. With it
            ignored rows cost nothing on a GPU either, and nobody waits for the GPU to count them.
            Too low a bound raises on the CPU and gives NaN elsewhere, in the loss and in each
            gradient.
        accumulate_weight_grad: backward adds the weight's gradient to `linear_weight.grad` itself,
            in one pass; autograd sees none, so that `torch.autograd.grad` has none to return. For a
            parameter without hooks on its gradient, "mean" or "sum", and class indices; not under
            torch.compile. Default False.
        impl: how the rows are computed: "auto" (default), "eager", "cpp", "cuda" or "triton"; an
            explicit one never falls back.
        group: processes over which the classes are spread, V / n on each, in the order of the
            group. Then `linear_weight` (V / n, H) and `linear_bias` (V / n,) are this process's
            shards; `input`, `target` (of all V classes), `weight` (V,) and the options must be the
            same on all of them, and so is the loss. The gradient of `input` is summed over the
            group, those of the shards stay local. Two all-reduces of a few numbers a row for each
            chunk. Class indices only; in plain torch; a graph break under `torch.compile`. A bias
            of -inf takes out the classes that pad the last shard, unless there is a softcap or
            label smoothing. None (default): one process has all classes.

    A head may be a DTensor, such as one of FSDP2 outside its module's forward. With a plain `input`
    it is gathered (all processes of its mesh must call), and its gradient is the mean over them,
    sharded as the head is: what FSDP2 does inside forward by default. With an `input` that is a
    DTensor, replicated on a mesh of one dimension, a head sharded by classes on that mesh stays
    where it is, as with `group`, and need not divide evenly; the loss is a plain tensor.

    Returns:
        A scalar, or the losses in `target`'s shape (without the classes) for "none"; fp32 for
        16-bit operands (torch: 16 bits). The mean over no row at all is 0 with zero gradients
        (torch: NaN). Gradients have the dtypes of their tensors.

    Raises:
        TypeError: operands are no floating-point tensors or differ in dtype, `target` holds no
            indices, `group` is no process group, or DTensors have placements other than these.
        ValueError: shapes or devices do not fit, a target is out of range (checked on the CPU;
            elsewhere its row is NaN, unless the environment variable FASTFT_CHECK_TARGETS is set),
            an option is out of range or unknown, `num_items` is negative, not finite or goes with
            another reduction, target probabilities require a gradient, `accumulate_weight_grad` is
            not possible; the shards of a `group` differ in shape (compared at every call on the
            CPU, elsewhere once for each shape) or this process is not in it.
        RuntimeError: the engine asked for is not available here (says why), or backward runs with
            `create_graph=True`.
    """
    check_tensors(input=input, linear_weight=linear_weight, target=target)
    check_reduction(reduction, num_items)
    options = row_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    accumulate = accumulate_weight_grad and torch.is_grad_enabled()
    if accumulate:
        check_accumulates(linear_weight, target, reduction, group)
    dtype = compute_dtype(input, linear_weight, linear_bias)
    check_shapes(input, linear_weight, linear_bias)
    input, linear_weight, linear_bias, target, group = local_head(
        input, linear_weight, linear_bias, target, group
    )
    shard = Shard.of(linear_weight.shape, group, "linear_weight", target, impl)
    classes = len(linear_weight) if shard is None else shard.classes
    check_weight(weight, classes, input.device)
    shape = input.shape[:-1]
    operands = input.reshape(-1, input.shape[-1]), linear_weight, linear_bias
    call = HeadCall.planned(
        operands,
        dtype,
        options,
        impl=impl,
        chunk_rows=chunk_rows,
        max_counted=max_counted,
        summed=reduction != "none",
    )
    with torch.autocast(input.device.type, enabled=False):
        if target.is_floating_point():
            check_probabilities(
                target, torch.Size([*shape, classes]), input.device, "the logits", impl
            )
            loss = _of_probabilities(operands, target, weight, call, reduction, num_items)
        else:
            flat = check_indices(target, input, -1, classes, ignore_index)
            loss = _of_indices(
                operands,
                flat,
                weight,
                call,
                reduction,
                num_items,
                shard=shard,
                accumulate=accumulate,
            )
    return loss.view(shape) if reduction == "none" else loss


class LinearCrossEntropyLoss(nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` on `fastft.linear_cross_entropy`: a head (`linear`) and its
    loss.

    Args:
        in_features: H.
        num_classes: V.
        bias: whether the head has one; default no.
        device: of the head's parameters.
        dtype: of the head's parameters.
        options: `weight`, `reduction`, `ignore_index`, `label_smoothing`, `softcap`, `logit_scale`,
            `z_loss`, `chunk_rows`, `impl`: as in `linear_cross_entropy`.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.options = options
        nothing = self.linear.weight[:0]
        with torch.no_grad():  # what is wrong with the options shows here and not in the first step
            self(nothing, torch.zeros(0, dtype=torch.int64, device=nothing.device))

    def forward(
        self, input: Tensor, target: Tensor, num_items: float | Tensor | None = None
    ) -> Tensor:
        """The loss of hidden states `input` (..., H) and `target` (...); `num_items` as in
        `linear_cross_entropy`."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        """What torch prints inside the parentheses."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
