"""The rows of a linear layer's cross-entropy: one operator for the forward and the backward pass of
every plan.

    z = x W^T + b;  loss[t], lse[t], entropy[t] and dz of z as in `cross_entropy`;  dx = dz W, dW = dz^T x, db = sum dz

x are the hidden states (T, H), W the head (V, H), y the targets. Ignored rows are taken out first:
T counts the others. They go through a workspace of R rows of logits, which the row kernel turns
into dz in place. What is computed when, in products of 2 T H V flops, depends on who needs a
gradient:

    a sum                      forward: z, dx, dW (3; 2 where W or x is frozen)     backward: a scaling
    rows, only x trained       forward: z, dx (2)                                   backward: a scaling of dx's rows
    rows, W or b trained       forward: z (1)                                       backward: z again, dx, dW (3)
    rows and their entropies   forward: z (1)                                       backward: z again, dx, dW (3)
    nobody needs one           forward: z (1)

Products run in the dtype of the operands (`head_gemms` says how), statistics and sums in fp32. dz
is between -1 and 1, unnormalised, and so are the gradients of a sum, and on a CPU and in fp16
(which loses nothing so under a GradScaler) those of a mean, a sum over N. A device's fp32 and bf16
gradients of a mean are divided in the forward pass:

    dW = sum over chunks of dz^T round(x / N),     dx = round(round(dz W) / N),     db = round(sum dz / N)

What backward scales by is 1 then, as a rule, and the scaling (`scale_gradients`) leaves them alone.
It is x that is divided and not dz: where a target has a small probability dz is near -1, and all
these would be rounded alike in bf16, by up to 0.39 %. The roundings of x differ, and there is one
of dW less.

R, the rows of a chunk: a product over R rows runs at about R / (R + 16) of its best rate on a CPU,
R / (R + 256) on a GPU, and every chunk reads and writes dW once. Both costs fall as R grows, so R
is what the workspace's budget holds, but at least 256 rows on a CPU, and from 1024 to 4096 on a
GPU. There the budget is 512 MiB or, where dW is held, as much as that takes: then R is H or more.
Free memory is never asked for: the chunks, and with them the roundings, are the same on every run.

Kept for backward: dx, dW and db, or only the operands where backward makes z again. Bytes moved on
top of the products'
operands: for each chunk, 4 passes over the workspace (R V) and 2 over dW.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import ops
from fastft.loss.cross_entropy import rows_implementation
from fastft.loss.head_gemms import NARROW_CHUNKS, HeadGemms, is_emulated, working_dtype
from fastft.loss.options import RowOptions, refuse_second_derivative, statistics_dtype, unrounded
from fastft.loss.scale_gradients import scale_gradients


class _Limits(NamedTuple):
    """Of the workspace: its bytes, and the rows which it holds at least and at most whatever they
    take."""

    budget: int
    least: int
    most: int


# a CPU's workspace should stay near its last-level cache, a GPU's products want a thousand rows
_LIMITS = {"cpu": _Limits(32 << 20, 256, 1 << 31)}
_DEVICE_LIMITS = _Limits(512 << 20, 1024, 4096)


def chunk_rows(
    count: int, classes: int, dtype: torch.dtype, device: torch.device, hidden: int = 0
) -> int:
    """How many of `count` rows go through the workspace at once, evenly spread over the chunks.

    `hidden`: H, where a gradient (V, H) is summed over the chunks, which read and write it.
    """
    budget, least, most = _LIMITS.get(device.type, _DEVICE_LIMITS)
    if device.type != "cpu":
        budget = max(budget, classes * hidden * dtype.itemsize)
    if is_emulated(dtype, device.type):
        budget //= 2  # the other half is for slabs of the weight in fp32
    rows = min(max(budget // (classes * working_dtype(dtype, device.type).itemsize), least), most)
    return _parts(count, _parts(count, rows)) if count else 0


def _parts(count: int, size: int) -> int:
    return -(-count // size)


def divides_rows(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the gradients of a mean are divided where they are made, for products in `dtype`."""
    return device.type != "cpu" and dtype in (torch.float32, torch.bfloat16)


class HeadCall(NamedTuple):
    """What the operator takes besides tensors, in the order of its schema."""

    needs: tuple[bool, bool, bool]  # whether the gradients of input, weight and bias are wanted now
    summed: bool  # losses are their sum, else one a row
    statistics: bool  # entropy and is_top1 are wanted
    dtype: torch.dtype  # of the products
    impl: str
    chunk_rows: int  # 0: planned
    max_counted: int  # an upper bound of the rows that count; -1: unknown
    options: RowOptions

    @classmethod
    def of(cls, *arguments: Any) -> HeadCall:
        """From the operator's arguments."""
        return cls(tuple(arguments[0]), *arguments[1:7], RowOptions(*arguments[7:]))  # type: ignore[call-arg]

    def flat(self) -> tuple[Any, ...]:
        """The operator's arguments."""
        return list(self.needs), *self[1:7], *self.options

    def step(self, count: int, weight: Tensor) -> int:
        """The rows of a chunk."""
        hidden = weight.shape[1] if self.needs[1] else 0
        return min(self.chunk_rows, count) or chunk_rows(
            count, len(weight), self.dtype, weight.device, hidden
        )

    def weight_sum_dtype(self, rows: int, weight: Tensor) -> torch.dtype:
        """The dtype in which dW is summed; ignored rows are among `rows`, so that it depends on
        shapes alone."""
        chunks = _parts(rows, self.step(rows, weight)) if rows else 0
        most = 1 if is_emulated(self.dtype, weight.device.type) else NARROW_CHUNKS
        narrow = weight.dtype == self.dtype and chunks <= most
        return self.dtype if narrow else statistics_dtype(self.dtype)


class Outputs(NamedTuple):
    """Of the operator; what is not wanted is empty."""

    losses: Tensor
    lse: Tensor
    entropy: Tensor
    is_top1: Tensor
    d_input: Tensor
    d_weight: Tensor
    d_bias: Tensor

    def of_rows(self, rows: int, statistics: bool) -> tuple[Tensor, ...]:
        """Room for the losses, lse and maybe entropy and is_top1 of some rows."""
        losses = self.losses.new_empty(rows)
        if not statistics:
            return losses, torch.empty_like(losses)
        return (
            losses,
            torch.empty_like(losses),
            torch.empty_like(losses),
            self.is_top1.new_empty(rows),
        )


def _outputs(input: Tensor, weight: Tensor, call: HeadCall) -> Outputs:
    """Zeros for rows; the parameters' gradients are not filled yet."""
    rows, classes = len(input), len(weight)
    sums = statistics_dtype(call.dtype)
    extra = rows if call.statistics else 0
    return Outputs(
        input.new_zeros(rows, dtype=sums),
        input.new_zeros(rows, dtype=sums),
        input.new_zeros(extra, dtype=sums),
        input.new_zeros(extra, dtype=torch.bool),
        input.new_zeros(input.shape if call.needs[0] else 0, dtype=call.dtype),
        input.new_empty(
            weight.shape if call.needs[1] else 0, dtype=call.weight_sum_dtype(rows, weight)
        ),
        input.new_zeros(classes if call.needs[2] else 0, dtype=sums),
    )


def _counted_rows(target: Tensor, ignore_index: int, max_counted: int) -> Tensor | None:
    """The positions of the rows that count, and on a device maybe a few more; None for all rows.

    A device is never waited for: without a bound from the host all its rows are taken, and cost
    their time.
    """
    counted = target != ignore_index
    if target.device.type == "cpu":
        if 0 <= max_counted < counted.sum():
            raise ValueError(f"max_counted is {max_counted}, but {int(counted.sum())} rows count")
        return None if counted.all() else counted.nonzero()[:, 0]
    if not 0 <= max_counted < len(target):
        return None
    return device_positions(counted, max_counted)


def device_positions(counted: Tensor, bound: int) -> Tensor:
    """`bound` positions, those that count first: found without a look at the numbers."""
    return torch.sort((~counted).to(torch.uint8), stable=True).indices[:bound]


def sweep(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    call: HeadCall,
    fill: Callable[[Tensor, slice | Tensor, Outputs], None],
    divisor: Tensor | None = None,
) -> Outputs:
    """Takes the rows that count through the head, a chunk after the other.

    `fill(z, where, outputs)` gets the logits of the rows at `where`; it writes what is known of
    these rows into `outputs` and, if any gradient is wanted, dz over the logits. `divisor`: of the
    gradients, ().
    """
    outputs = _outputs(input, linear_weight, call)
    positions = _counted_rows(target, call.options.ignore_index, call.max_counted)
    count = len(input) if positions is None else len(positions)
    step = call.step(count, linear_weight)
    bias = None if linear_bias is None else linear_bias.to(call.dtype)
    gemms = HeadGemms(linear_weight.to(call.dtype), bias, step, outputs.d_weight, outputs.d_bias)
    inverse = None if divisor is None else divisor.reciprocal()
    for begin in range(0, count, step or 1):
        chunk = slice(begin, min(begin + step, count))
        where = chunk if positions is None else positions[chunk]
        x = input[where].to(call.dtype)
        z = gemms.logits(x)
        fill(z, where, outputs)
        if call.needs[0]:
            outputs.d_input[where] = gemms.d_input(z).to(call.dtype)
        if inverse is not None and call.needs[1]:
            x = _times(x, inverse)
        gemms.add_parameters(z, x, call.needs)
    if not count:
        outputs.d_weight.zero_()
    if inverse is not None and (call.needs[0] or call.needs[2]):
        scale_gradients([outputs.d_input, outputs.d_bias], inverse)
    if positions is not None and not target.is_cpu:
        _show_left_out(
            (target != call.options.ignore_index).sum() > call.max_counted, outputs, call.needs
        )
    return outputs


def _show_left_out(too_many: Tensor, outputs: Outputs, needs: Sequence[bool]) -> None:
    """Rows that were left out must not go unseen: losses become NaN, and one number of each
    gradient.

    Trainer's log leaves a NaN loss out, but not a NaN gradient norm.
    """
    outputs.losses.masked_fill_(too_many, torch.nan)
    for gradient in itertools.compress(outputs[-3:], needs):
        gradient.view(-1)[:1].masked_fill_(too_many, torch.nan)


def _linear_cross_entropy_rows(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    upstream: Sequence[Tensor],
    divisor: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    call = HeadCall.of(*arguments)
    rows = rows_implementation(
        call.impl, working_dtype(call.dtype, input.device.type), input.device
    )
    weights = [] if weight is None else [weight]

    def fill(z: Tensor, where: slice | Tensor, outputs: Outputs) -> None:
        results = outputs.of_rows(len(z), call.statistics)
        losses, lse, *statistics = results
        upstreams, grad = [u[where] for u in upstream], [z] if any(call.needs) else []
        rows(z, target[where], weights, upstreams, losses, lse, statistics, grad, *call.options)
        for output, values in zip(outputs, results, strict=False):
            output[where] = values

    with torch.autocast(input.device.type, enabled=False):
        outputs = sweep(input, linear_weight, linear_bias, target, call, fill, divisor)
        total = outputs.losses.sum() if call.summed else outputs.losses
        return total if divisor is None else total / divisor, *outputs[1:]


def _fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    upstream: Sequence[Tensor],
    divisor: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    call = HeadCall.of(*arguments)
    outputs = _outputs(input, linear_weight, call)
    return outputs.losses.sum() if call.summed else outputs.losses, *outputs[1:]


# The gradients of losses (their sum, or times upstream: see ROWS) are of a forward or of a backward
# pass alike. A sum and its gradients may have a divisor, ().
HEAD = ops.Operator(
    "linear_cross_entropy_rows(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor "
    "target, Tensor? weight, "
    "Tensor[] upstream, Tensor? divisor, bool[] needs, bool summed, bool statistics, ScalarType "
    "dtype, str impl, "
    "int chunk_rows, int max_counted, int ignore_index, float label_smoothing, float z_loss, float "
    "softcap, "
    "float logit_scale) -> "
    "(Tensor losses, Tensor lse, Tensor entropy, Tensor is_top1, Tensor d_input, Tensor d_weight, "
    "Tensor d_bias)",
    _linear_cross_entropy_rows,
    engines={},
    fake=_fake,
)


def _graph_is_kept() -> bool:
    """Whether the running backward may be followed by another over the same graph; True where torch
    does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """None for those that nobody needs."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def rounded(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """`gradients` in `dtypes`; None stays None."""
    return [None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


def _times(tensor: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.mul(tensor, unrounded(scale), out=torch.empty_like(tensor, dtype=dtype))


def scaled(
    gradients: Sequence[Tensor | None], scale: Tensor, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """`gradients` times `scale`, () or of rows (T, 1), in fp32, rounded once to `dtypes`; None
    stays None.

    In place where nobody can ask for a gradient again: saves a second (V, H) and its page faults.
    """
    results, in_place, kept = [], [], _graph_is_kept()
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        # not in place for a tensor that a compiler traces with
        if gradient is None or (type(gradient) is Tensor and gradient.dtype == dtype and not kept):
            results.append(gradient)
            in_place += [] if gradient is None else [gradient]
        else:
            results.append(_times(gradient, scale, dtype))
    if scale.dim():
        for gradient in in_place:
            gradient.mul_(scale)
    elif in_place:
        scale_gradients(in_place, scale)
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.call = HeadCall.of(*inputs[7:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in inputs[:3])
    ctx.kept, ctx.upstreams = any(ctx.call.needs), len(inputs[5])
    ctx.save_for_backward(*(output[4:] if ctx.kept else inputs[:5]))


def _backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative("linear_cross_entropy")
    needs, call = ctx.needs_input_grad[:3], ctx.call
    if ctx.kept:
        (scale,) = upstreams[:1]
        assert scale is not None
        results = scaled(
            needed(ctx.saved_tensors, needs), scale if call.summed else scale[:, None], ctx.dtypes
        )
    else:
        *operands, target, weight = ctx.saved_tensors
        outputs = _recompute(
            operands, target, weight, upstreams[:3], call._replace(needs=tuple(needs))
        )
        results = rounded(needed(outputs[4:], needs), ctx.dtypes)
    return *results, None, None, [None] * ctx.upstreams, *(None,) * 13


def _recompute(
    operands: Sequence[Tensor],
    target: Tensor,
    weight: Tensor | None,
    upstreams: tuple[Tensor | None, ...],
    call: HeadCall,
) -> tuple[Tensor, ...]:
    """The operator again, with the gradients of its results."""
    zero = torch.zeros(target.shape, dtype=statistics_dtype(call.dtype), device=target.device)
    losses, lse, entropy = (
        zero if u is None else u.expand(target.shape).contiguous() for u in upstreams
    )
    upstream = [losses] if lse is entropy is zero else [losses, lse, entropy]
    call = call._replace(summed=False, statistics=False)
    return HEAD.native(*operands, target, weight, upstream, None, *call.flat())


torch.library.register_autograd(
    HEAD.qualified_name, _backward, setup_context=_setup_context, lib=ops.library
)


def linear_rows(
    operands: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    *,
    dtype: torch.dtype,
    options: RowOptions,
    impl: str = "auto",
    summed: bool = False,
    divisor: Tensor | None = None,
    statistics: bool = False,
    chunk_rows: int | None = None,
    max_counted: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (or their sum), lse, entropy and is_top1 of a head over flat rows, by the plan that
    gradients call for.

    Args:
        operands: input (T, H), linear_weight (V, H), linear_bias (V,) or None.
        target: (T,), contiguous.
        weight: as `class_weights` returns it.
        dtype: of the products.
        options: of the rows.
        impl: of the row kernel.
        summed: losses are their sum.
        divisor: (), of that sum and its gradients.
        statistics: entropy and is_top1 are computed.
        chunk_rows: rows of a chunk; None: planned.
        max_counted: see `linear_cross_entropy`.
    """
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in operands)
    now = summed or not (statistics or any(wanted[1:]))
    needs = (wanted[0], wanted[1], wanted[2]) if now else (False, False, False)
    bound = -1 if max_counted is None else max_counted
    call = HeadCall(needs, summed, statistics, dtype, impl, chunk_rows or 0, bound, options)
    return HEAD.native(*operands, target, weight, [], divisor, *call.flat())[:4]
