"""Rows through an output head, a chunk after the other.

    for each chunk of R rows:  z = x W^T + b;  z becomes dz;  dx = dz W;  dW += dz^T x;  db += sum dz

x are the hidden states (T, H), W the head (V, H). Ignored rows are taken out first: T counts the
others.

R, the rows of a chunk: a product over R rows runs at about R / (R + 16) of its best rate on a CPU,
R / (R + 256) on a GPU, and every chunk reads and writes dW once. Both costs fall as R grows, so R
is what the workspace's budget holds, but at least 256 rows on a CPU, and from 1024 to 4096 on a
GPU. There the budget is 512 MiB or, where dW is held, as much as that takes: then R is H or more.
Free memory is never asked for: the chunks, and with them the roundings, are the same on every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.loss.head_gemms import NARROW_CHUNKS, HeadGemms, is_emulated, working_dtype
from fastft.loss.options import RowOptions, statistics_dtype, unrounded
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


def empty_outputs(input: Tensor, weight: Tensor, call: HeadCall) -> Outputs:
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
    outputs = empty_outputs(input, linear_weight, call)
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
