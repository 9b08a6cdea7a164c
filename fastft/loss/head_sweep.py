"""The sweep of rows through an output head, a chunk after the other: all losses of a head do it.

    z = x W^T + b (+ x' W'^T + b' ...)        the rows of a chunk, into the workspace
    dz                                        made of z by the loss, there or in memory of its own
    dx = dz W;  dW += dz^T x;  db += sum dz   for each linear layer, as far as they are wanted

x are the hidden states (T, H), W the head (V, H). A head is one linear layer, or the sum of several
(LoRA). Heads whose logits one loss reads (a student's and its teacher's) go side by side, each with
a workspace. Rows that do not count are taken out before: T counts the others.

A chunk has R rows. A product over R rows runs at about R / (R + 16) of its best rate on a CPU,
R / (R + 256) on a GPU, and every chunk reads and writes dW once. Both costs fall as R grows, so R
is what the workspace's budget holds, but at least 256 rows on a CPU, and from 1024 to 4096 on a
GPU. Where dW is held R is H or more, which takes no more than dW: up to 512 rows on a CPU, and up
to 4096 on a GPU.
Free memory is never asked for: the chunks, and with them the roundings, are the same on every run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastft import _native
from fastft.checks import optional_integer
from fastft.loss.head_gemms import NARROW_CHUNKS, HeadTerm, is_emulated, working_dtype
from fastft.loss.options import RowOptions, statistics_dtype, times
from fastft.loss.scale_gradients import scale_gradients
from fastft.ops import check_impl

Operands: TypeAlias = tuple[Tensor, Tensor, "Tensor | None"]  # input, weight and bias of a head
Where: TypeAlias = "slice | Tensor"  # positions of rows


# the bytes of the workspace, the rows which it holds at least and at most whatever they take, and
# up to how many where these take no more than dW: a CPU's should stay near its last-level cache, a
# GPU's products want a thousand rows
_LIMITS = {"cpu": (32 << 20, 256, 1 << 31, 512)}
_DEVICE_LIMITS = (512 << 20, 1024, 4096, 4096)


def chunk_rows(
    count: int, classes: int, dtype: torch.dtype, device: torch.device, hidden: int = 0
) -> int:
    """How many of `count` rows go through the workspace at once, evenly spread over the chunks.

    `hidden`: H, where a gradient (V, H) is summed over the chunks, which read and write it.
    """
    budget, least, most, beside_gradient = _LIMITS.get(device.type, _DEVICE_LIMITS)
    least = max(least, min(hidden, beside_gradient))
    if is_emulated(dtype, device.type):
        budget //= 2  # the other half is for slabs of the weight in fp32
    rows = min(max(budget // (classes * working_dtype(dtype, device.type).itemsize), least), most)
    return _parts(count, _parts(count, rows)) if count else 0


def _parts(count: int, size: int) -> int:
    return -(-count // size)


class CountedRows(NamedTuple):
    """The rows of a head that go through it."""

    total: int  # T, with those that do not
    positions: Tensor | None = None  # None: all of them
    too_many: Tensor | None = None  # (), on a device: whether rows that count are left out

    @classmethod
    def of(cls, target: Tensor, ignore_index: int, max_counted: int) -> CountedRows:
        """The rows whose `target` is not ignored, on a device maybe with a few others.

        A device is never waited for: without a bound from the host, `max_counted` >= 0, all its
        rows are taken, and cost their time.

        Raises:
            ValueError: more rows count than `max_counted` (on a CPU).
        """
        counted, rows = target != ignore_index, len(target)
        # looking at a CPU's numbers is free
        if target.device.type == "cpu":
            if 0 <= max_counted < counted.sum():
                raise ValueError(
                    f"max_counted is {max_counted}, but {int(counted.sum())} rows count"
                )
            return cls(rows, None if counted.all() else counted.nonzero()[:, 0])
        if not 0 <= max_counted < rows:
            return cls(rows)
        # those that count first, found without a look at the numbers
        first = torch.sort((~counted).to(torch.uint8), stable=True).indices[:max_counted]
        return cls(rows, first, counted.sum() > max_counted)

    @property
    def counted(self) -> int:
        """How many they are."""
        return self.total if self.positions is None else len(self.positions)

    def with_gradient(self, upstream: Tensor) -> CountedRows:
        """Those of them that receive a gradient from `upstream` (T, ...), if looking is free."""
        if upstream.device.type != "cpu":
            return self
        # a row whose upstream is 0 has gradients of 0, and needs no logits
        every = torch.arange(self.total) if self.positions is None else self.positions
        wanted = upstream.reshape(self.total, upstream.shape[1:].numel()).any(1)[every]
        return self if wanted.all() else self._replace(positions=every[wanted])

    def chunks(self, step: int) -> Iterator[Where]:
        """The rows, `step` at a time."""
        for begin in range(0, self.counted, step or 1):
            chunk = slice(begin, min(begin + step, self.counted))
            yield chunk if self.positions is None else self.positions[chunk]

    def show_left_out(self, losses: Tensor | None, gradients: Sequence[Tensor | None]) -> None:
        """Makes losses NaN, and one number of each gradient, where rows that count were left out.

        Trainer's log leaves a NaN loss out, but not a NaN gradient norm.
        """
        for tensor in (losses, *(g if g is None else g.view(-1)[:1] for g in gradients)):
            if self.too_many is not None and tensor is not None:
                tensor.masked_fill_(self.too_many, torch.nan)


def sweep(
    heads: Sequence[Sequence[HeadTerm]],
    rows: CountedRows,
    step: int,
    fill: Callable[[list[Tensor], Where], Sequence[Tensor | None]],
    inverse: Tensor | None = None,
) -> None:
    """Takes `rows` through one head, or several side by side, `step` rows at a time.

    Args:
        heads: the linear layers whose sum each head is.
        rows: which rows of their inputs.
        step: rows of a chunk.
        fill: `fill(logits, where)` gets the logits of each head of the rows at `where`, in the
            workspaces, and returns dz of each, there or elsewhere; None where nobody wants a
            gradient.
        inverse: () times which x goes into dW.
    """
    # one of each head for all chunks: new pages cost as much time as the products write
    workspaces = [_workspace(terms, step) for terms in heads]
    with torch.autocast(workspaces[0].device.type, enabled=False):
        for where in rows.chunks(step):
            _through_heads(heads, workspaces, where, fill, inverse)
        for term in itertools.chain(*heads):
            if term.is_first and term.d_weight is not None:
                term.d_weight.zero_()


def _workspace(terms: Sequence[HeadTerm], step: int) -> Tensor:
    weight = terms[0].weight
    dtype = functools.reduce(torch.promote_types, (term.dtype for term in terms))
    return _native.expect_use(weight.new_empty(step, len(weight), dtype=dtype))


def _through_heads(
    heads: Sequence[Sequence[HeadTerm]],
    workspaces: Sequence[Tensor],
    where: Where,
    fill: Callable[[list[Tensor], Where], Sequence[Tensor | None]],
    inverse: Tensor | None,
) -> None:
    """A function, so that the next chunk finds nothing of this one's in memory."""
    inputs = [[term.input[where].to(term.weight.dtype) for term in terms] for terms in heads]
    logits = [space[: len(xs[0])] for space, xs in zip(workspaces, inputs, strict=True)]
    for terms, xs, z in zip(heads, inputs, logits, strict=True):
        for term, x in zip(terms, xs, strict=True):
            term.add_logits(x, z, first=term is terms[0])
    for terms, xs, dz in zip(heads, inputs, fill(logits, where), strict=True):
        if dz is None:
            continue
        for term, x in zip(terms, xs, strict=True):
            term.add_gradients(dz, x, where, inverse)


class HeadCall(NamedTuple):
    """What the operator of a head's rows takes besides tensors, in the order of its schema."""

    needs: tuple[bool, bool, bool]  # whether the gradients of input, weight and bias are wanted now
    summed: bool  # losses are their sum, else one a row
    statistics: bool  # entropy and is_top1 are wanted
    dtype: torch.dtype  # of the products
    impl: str  # of the row kernel
    chunk_rows: int  # 0: planned
    max_counted: int  # an upper bound of the rows that count; -1: unknown
    options: RowOptions
    moments: bool = False  # mean_logits and log_sum_sq_probs are wanted

    @classmethod
    def planned(
        cls,
        operands: Operands,
        dtype: torch.dtype,
        options: RowOptions,
        *,
        impl: str,
        chunk_rows: int | None,
        max_counted: int | None,
        summed: bool = False,
        statistics: bool = False,
        moments: bool = False,
    ) -> HeadCall:
        """By the plan that the gradients of `operands` call for (see `linear_rows`).

        Raises:
            ValueError: `impl` is no engine's name, `chunk_rows` no integer from 1 on, or
                `max_counted` none from 0 on.
        """
        check_impl(impl)
        chunk_rows = optional_integer("chunk_rows", chunk_rows)
        max_counted = optional_integer("max_counted", max_counted, least=0)
        x, weight, bias = (
            torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            for tensor in operands
        )
        # the gradients of a sum are known before backward, and so is that of x by each row's loss
        now = summed or not (statistics or weight or bias)
        needs = (x, weight, bias) if now else (False, False, False)
        bound = -1 if max_counted is None else max_counted
        plan = statistics, dtype, impl, chunk_rows or 0, bound, options, moments
        return cls(needs, summed, *plan)

    @classmethod
    def of(cls, *arguments: Any) -> HeadCall:
        """From the operator's arguments."""
        needs, *plan = arguments[:7]
        return cls(tuple(needs), *plan, RowOptions(*arguments[7:-1]), arguments[-1])  # type: ignore[call-arg]

    def flat(self) -> tuple[Any, ...]:
        """The operator's arguments."""
        return list(self.needs), *self[1:7], *self.options, self.moments

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
    """What the operator of a head's rows returns; what is not wanted is empty."""

    losses: Tensor
    lse: Tensor
    entropy: Tensor
    is_top1: Tensor
    mean_logits: Tensor
    log_sum_sq_probs: Tensor
    d_input: Tensor
    d_weight: Tensor
    d_bias: Tensor

    @classmethod
    def empty(cls, input: Tensor, weight: Tensor, call: HeadCall) -> Outputs:
        """Zeros for rows; the weight's gradient is not filled yet."""
        rows, classes = len(input), len(weight)
        sums = statistics_dtype(call.dtype)
        extra, more = rows if call.statistics else 0, rows if call.moments else 0
        return cls(
            input.new_zeros(rows, dtype=sums),
            input.new_zeros(rows, dtype=sums),
            input.new_zeros(extra, dtype=sums),
            input.new_zeros(extra, dtype=torch.bool),
            input.new_zeros(more, dtype=sums),
            input.new_zeros(more, dtype=sums),
            input.new_zeros(input.shape if call.needs[0] else 0, dtype=call.dtype),
            input.new_empty(
                weight.shape if call.needs[1] else 0, dtype=call.weight_sum_dtype(rows, weight)
            ),
            input.new_zeros(classes if call.needs[2] else 0, dtype=sums),
        )

    @property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the operands."""
        return self.d_input, self.d_weight, self.d_bias

    def of_rows(self, rows: int, statistics: bool) -> tuple[Tensor, ...]:
        """Room for the losses, lse and maybe entropy and is_top1 of some rows."""
        return tuple(result.new_empty(rows) for result in self[: 4 if statistics else 2])


def sweep_one(
    operands: Operands,
    target: Tensor,
    call: HeadCall,
    fill: Callable[[Tensor, Where, Outputs], Tensor | None],
    divisor: Tensor | None = None,
) -> Outputs:
    """Takes the rows that count through a head of one layer.

    `fill` is `sweep`'s; it also writes what is known of its rows into the outputs. `divisor`: of
    the gradients, ().
    """
    input, weight, bias = operands
    outputs = Outputs.empty(input, weight, call)
    _native.expect_use(outputs.d_weight)
    rows = CountedRows.of(target, call.options.ignore_index, call.max_counted)
    inverse = None if divisor is None else divisor.reciprocal()
    gradients = [g if need else None for g, need in zip(outputs.gradients, call.needs, strict=True)]
    term = HeadTerm(input, weight, bias, call.dtype, gradients)
    step = call.step(rows.counted, weight)
    sweep([[term]], rows, step, lambda z, where: [fill(z[0], where, outputs)], inverse)
    # dx and db are divided at the end: their rows are rounded already, and the sum has no rows left
    if inverse is not None and (call.needs[0] or call.needs[2]):
        scale_gradients([outputs.d_input, outputs.d_bias], inverse)
    rows.show_left_out(outputs.losses, gradients)
    return outputs


def handed_back(
    gradients: Sequence[Tensor | None],
    needs: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
    scale: Tensor | None = None,
) -> list[Tensor | None]:
    """What backward returns: `gradients` times `scale` in fp32, rounded once to `dtypes`.

    None for those that nobody needs. `scale`: () or of rows (T,), for a gradient (T, H); None: 1.
    In place where nobody can ask for a gradient again: saves a second (V, H) and its page faults.
    """
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    if scale is None:
        return [g if g is None else g.to(dtype) for g, dtype in zip(wanted, dtypes, strict=True)]
    column, results, in_place = scale[:, None] if scale.dim() else scale, [], []
    # another backward over the same graph may follow, where torch does not tell that none will
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    kept = ask is None or ask()
    for gradient, dtype in zip(wanted, dtypes, strict=True):
        # a compiler cannot trace a change in place
        is_ours = not kept and type(gradient) is Tensor and gradient.dtype == dtype
        if gradient is not None and not is_ours:
            gradient = times(gradient, column, dtype)
        elif gradient is not None and scale.dim():
            gradient.mul_(column)
        elif gradient is not None:
            in_place.append(gradient)
        results.append(gradient)
    if in_place:
        scale_gradients(in_place, scale)
    return results
