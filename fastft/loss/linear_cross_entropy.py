"""Cross-entropy of a linear layer: the loss of logits x W^T + b that are never held as a whole.

    loss = sum over rows of cross_entropy(x W^T + b), or its mean, or the rows

x are the hidden states (T, H), W the head (V, H). What a row's loss is stands in `cross_entropy`,
how rows go through the head, what is kept for backward and which bytes are moved in `linear_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastft.loss.cross_entropy_rows import probability_losses
from fastft.loss.dtensor_head import local_head
from fastft.loss.head_sweep import divides_rows
from fastft.loss.lazy.expressions import LOGITS, Linear, map_rows, sum_over_rows
from fastft.loss.linear_rows import linear_rows
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
    divisor_of,
    reduce_losses,
    row_options,
    statistics_dtype,
)
from fastft.loss.vocab_parallel import Shard, vocab_parallel_losses
from fastft.loss.weight_grad import check_accumulates, sum_into_grad

if TYPE_CHECKING:  # builds of torch without processes do not have it
    from torch.distributed import ProcessGroup


def compute_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of the GEMMs: autocast's where it is on, as for `F.linear`; else the one that all
    operands share."""
    operands = {
        "input": input,
        "linear_weight": weight,
        **({} if bias is None else {"linear_bias": bias}),
    }
    check_tensors(**operands)
    for name, tensor in operands.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        check_device(name, tensor, input.device)
    device = input.device.type
    if torch.is_autocast_enabled(device) and all(
        t.dtype != torch.float64 for t in operands.values()
    ):
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

    def complain(name: str, tensor: Tensor, rule: str, other: str, shape: torch.Size) -> None:
        raise ValueError(
            f"{name} must be {rule}: {name} is {tuple(tensor.shape)}, {other} is {tuple(shape)}"
        )

    if input.dim() < 1:
        raise ValueError("input must be (..., H), got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or len(weight) == 0:
        complain(
            "linear_weight", weight, "(V, H) with V >= 1 and the H of input", "input", input.shape
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        complain("linear_bias", bias, "(V,)", "linear_weight", weight.shape)


def check_indices(target: Tensor, input: Tensor, classes: int, ignore_index: int) -> Tensor:
    """`target`, flat and contiguous; raises if it does not fit the hidden states or holds a wrong
    index."""
    check_device("target", target, input.device)
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must be of input's shape without its last dimension: target is "
            f"{tuple(target.shape)}, needed is "
            f"{tuple(input.shape[:-1])}"
        )
    check_target(target, classes, ignore_index)
    return target.reshape(-1).contiguous()


def _probability_losses(
    operands: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    options: RowOptions,
    summed: bool,
) -> Tensor:
    x, head, bias = (None if tensor is None else tensor.to(dtype) for tensor in operands)
    assert x is not None and head is not None
    linear = Linear.of((x, head, bias))
    if summed:
        return sum_over_rows(
            linear, LOGITS, lambda z, t: probability_losses(z, t, weight, options).sum(), target
        )
    return map_rows(linear, LOGITS, lambda z, t: probability_losses(z, t, weight, options), target)


def check_positive(name: str, value: int | None, least: int) -> None:
    """Raises if `value` is given and below `least`."""
    if value is not None and value < least:
        raise ValueError(f"{name} must be None or at least {least}, got {value}")


def _index_loss(
    operands: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    *,
    shard: Shard | None,
    accumulate: bool,
    impl: str,
    **plan: Any,
) -> Tensor:
    """The reduced loss of class indices (T,); `plan` is of `linear_rows`."""
    dtype, ignore_index, summed = plan["dtype"], plan["options"].ignore_index, reduction != "none"
    weight = class_weights(
        weight, target, ignore_index, reduction, num_items, statistics_dtype(dtype)
    )
    if shard is None and reduction == "mean" and divides_rows(dtype, target.device):
        plan["divisor"] = divisor_of(target != ignore_index, num_items, statistics_dtype(dtype))
        reduction = "sum"  # of what is divided
    if shard is not None:
        losses = vocab_parallel_losses(operands, target, weight, shard, summed=summed, **plan)
    elif accumulate:
        losses = sum_into_grad(operands, target, weight, impl=impl, **plan)
    else:
        losses, *_ = linear_rows(operands, target, weight, summed=summed, impl=impl, **plan)
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
    the CPU, or 256 rows of logits where these are larger; on a GPU 512 MB, or as much as the
    weight's gradient takes, or 1024 rows. Obeys autocast as `F.linear` does. Changes no input;
    works under gradient checkpointing and `torch.compile(fullgraph=True)`; a retained graph gives
    the same gradients again; differentiating twice raises.

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
        impl: how the rows are computed: "auto" (default), "eager" or "cpp"; an explicit one never
            falls back.
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
    where it is, as with `group`; the loss is a plain tensor.

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
    check_positive("chunk_rows", chunk_rows, 1)
    check_positive("max_counted", max_counted, 0)
    dtype = compute_dtype(input, linear_weight, linear_bias)
    check_shapes(input, linear_weight, linear_bias)
    input, linear_weight, linear_bias, target, group = local_head(
        input, linear_weight, linear_bias, target, group
    )
    shard = (
        None
        if group is None
        else Shard.of(linear_weight.shape, group, "linear_weight", target, impl)
    )
    classes = len(linear_weight) if shard is None else shard.classes
    check_weight(weight, classes, input.device)
    shape = input.shape[:-1]
    operands = input.reshape(-1, input.shape[-1]), linear_weight, linear_bias
    with torch.autocast(input.device.type, enabled=False):
        if target.is_floating_point():
            check_probabilities(target, torch.Size([*shape, classes]), input.device, "the logits")
            check_plain_impl(impl, "target probabilities")
            flat = torch.zeros(shape.numel(), dtype=torch.int64, device=input.device)
            rows = target.reshape(-1, classes)
            losses = _probability_losses(
                operands, rows, weight, dtype, options, reduction != "none"
            )
            reduced = reduce_losses(losses, flat, reduction, -1, num_items)
        else:
            flat = check_indices(target, input, classes, ignore_index)
            plan: dict[str, Any] = {"dtype": dtype, "options": options}
            plan |= {"chunk_rows": chunk_rows, "max_counted": max_counted}
            plan |= {"shard": shard, "accumulate": accumulate, "impl": impl}
            reduced = _index_loss(operands, flat, weight, reduction, num_items, **plan)
    return reduced.view(shape) if reduction == "none" else reduced


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
        with torch.no_grad():  # what is wrong with the options shows here and not in the first step
            self(
                self.linear.weight[:0],
                torch.zeros(0, dtype=torch.int64, device=self.linear.weight.device),
            )

    def forward(
        self, input: Tensor, target: Tensor, num_items: float | Tensor | None = None
    ) -> Tensor:
        """The loss of hidden states `input` (..., H) and `target` (...); `num_items` as in
        `linear_cross_entropy`."""
        head: dict[str, Any] = {
            "linear_bias": self.linear.bias,
            "weight": self.weight,
            "num_items": num_items,
        }
        return linear_cross_entropy(input, self.linear.weight, target, **head, **self.options)

    def extra_repr(self) -> str:
        """What torch prints inside the parentheses."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
