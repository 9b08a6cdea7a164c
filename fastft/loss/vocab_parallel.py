"""Cross-entropy whose classes are spread over processes.

Each process holds a shard of the head, and all see the same rows.

    z_i = x W_i^T + b_i             (R, V / n) on process i of n, classes in the group's order
    m = max_i max_v z_i[v]          first all-reduce of a chunk, R numbers
    others = sum_i sum_{v != y} exp(z_i[v] - m),   m - z[y],   sum_i sum_v w[v] (m - z_i[v])
                                    second all-reduce, R x 2 numbers (3 with label smoothing)
    dz_i                            from these by the formulas of `cross_entropy_rows`
    dW_i = dz_i^T x, db_i = sum dz_i    stay where they are
    dx = sum_i dz_i W_i             one all-reduce of (T, H)

Shards are of one size, but where a DTensor says how large they are: then the last one may be
smaller. Every process computes the same losses from the sums, to the bit. They leave the target
out, as `cross_entropy_rows` does for confident rows. Chunks, products and who needs a gradient when
are those of `linear_rows`; rows are computed in plain torch, with the formulas in fp32. Logits that
exist, sharded in the same way, take the same road without the products; they are what is kept then,
besides the 4 numbers. Every process has the class weights of all classes.

Kept for backward: dx, dW_i and db_i; or the operands and 4 numbers a row, with which backward
reduces nothing but dx. Bytes moved: those of `linear_rows` for V / n classes, about 8 more passes
over the workspace, and the all-reduces.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastft.loss.cross_entropy_rows import capped
from fastft.loss.head_sweep import (
    CountedRows,
    HeadCall,
    Operands,
    Outputs,
    Where,
    chunk_rows,
    handed_back,
    sweep_one,
)
from fastft.loss.options import (
    RowOptions,
    check_plain_impl,
    refuse_second_derivative,
    statistics_dtype,
)

# the processes of a group compare the shapes of their shards at every call where looking at the
# answer is free, elsewhere once for each shape; a group that is gone takes its shapes along
_LOOKING_IS_FREE = ("cpu",)
_EVEN: weakref.WeakKeyDictionary[Any, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


class Shard(NamedTuple):
    """The classes of this process."""

    # torch.distributed.ProcessGroup, which builds of torch without processes do not have
    group: Any
    begin: int  # the first of them
    classes: int  # of all processes

    @classmethod
    def of(
        cls, shape: Sequence[int], group: Any, label: str, target: Tensor, impl: str
    ) -> Shard | None:
        """For a tensor named `label`, of `shape` (V / n, ...); None where there is no group, all
        processes of which must call it. A `group` that is a `Shard` already is what it returns.

        Raises:
            TypeError: `group` is no process group.
            ValueError: this process is not in it, `target` holds probabilities, or the processes
                have tensors of different shapes. On other devices than CPUs they compare each shape
                once, so that later calls do not wait for the device; there a process whose shape is
                new waits for those that know theirs.
            RuntimeError: `impl` is not plain torch.
        """
        if group is None:
            return None
        check_plain_impl(impl, "the rows of a group's processes")
        if target.is_floating_point():
            raise ValueError(
                "target must hold class indices where a group is given, got probabilities"
            )
        if isinstance(group, Shard):
            return group
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group does not contain this process")
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
            )
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        seen = _EVEN.setdefault(group, set())
        if target.device.type in _LOOKING_IS_FREE or tuple(shape) not in seen:
            own = torch.tensor(shape, device=target.device)
            shapes = [torch.empty_like(own) for _ in range(world)]
            dist.all_gather(shapes, own, group=group)
            every = [tuple(other.tolist()) for other in shapes]
            if len(set(every)) > 1:
                raise ValueError(
                    f"group must have a {label} of one size on all of its processes, got {every} "
                    f"in their order"
                )
            seen.add(tuple(shape))
        return cls(group, rank * shape[0], world * shape[0])

    @property
    def largest(self) -> int:
        """The classes of each process but the last, which may have fewer."""
        return -(-self.classes // dist.get_world_size(self.group))

    def whole(self, logits: Tensor) -> Tensor:
        """The logits (..., V) of all classes, where this process has (..., V / n) of them.

        All processes must call it.
        """
        own = F.pad(logits, (0, self.largest - logits.shape[-1]))
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        parts[-1] = parts[-1][..., : self.classes - (len(parts) - 1) * self.largest]
        return torch.cat(parts, -1)

    def own(self, logits: Tensor) -> Tensor:
        """What this process has of the logits (..., V) of all classes."""
        return logits[..., self.begin : self.begin + self.largest].contiguous()


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return shard.whole(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("logits that processes have put together")
        return ctx.shard.own(gradient), None


class _Alike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.shard.group)
        return summed, None


def whole_logits(operands: Operands, shard: Shard) -> Tensor:
    """The logits (..., V) of a head of which each process has a shard: real ones, differentiable.

    All processes must call it, with the same input (..., H), whose gradient is summed over them.
    """
    input, weight, bias = operands
    return _Whole.apply(F.linear(_Alike.apply(input, shard), weight, bias), shard)


class _Shared(NamedTuple):
    """What the processes know together about some rows: columns (R, 1)."""

    highest: Tensor
    others: Tensor
    below: Tensor  # how far the target is below the highest
    spreads: Tensor  # how far all classes are, weighted and summed; 0 without label smoothing

    @property
    def log_sum(self) -> Tensor:
        # log of the sum is log1p of the sum without the class that holds the maximum, whose
        # exponential is exactly 1
        without = torch.where(self.below == 0, self.others, self.others - 1 + (-self.below).exp())
        return without.log1p()


class ShardedRows:
    """Some rows of a shard of the classes: a matrix (R, V / n) and columns (R, 1).

    Args:
        logits: (R, V / n).
        target: (R,), of all classes.
        weight: of all classes, or None.
        options: those of the loss.
        shard: the classes of this process.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: RowOptions,
        shard: Shard,
    ) -> None:
        target, dtype, count = (
            target.long()[:, None],
            statistics_dtype(logits.dtype),
            logits.shape[1],
        )
        self.options, self.z = options, capped(logits.to(dtype), options)
        self.ignored = target == options.ignore_index
        self.wrong = ((target < 0) | (target >= shard.classes)) & ~self.ignored
        index = target - shard.begin
        self.mine = (index >= 0) & (index < count) & ~self.ignored
        self.own = torch.where(self.mine, index, 0)  # some class, where the target is not ours
        # what the target's class has of the loss, and what every class has
        self.hits = torch.full_like(target, 1 - options.label_smoothing, dtype=dtype)
        self.spread = options.label_smoothing / shard.classes
        self.weight: Tensor | float = 1.0
        self.weight_sum: Tensor | float = float(shard.classes)
        if weight is not None:
            self.hits *= weight[target.masked_fill(self.ignored | self.wrong, 0)]
            self.weight = weight[shard.begin : shard.begin + count]
            self.weight_sum = weight.sum()

    def shared(self, group: Any) -> _Shared:
        """Makes the two all-reduces."""
        highest = self.z.amax(1, keepdim=True)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        distance = highest - self.z
        parts = [torch.where(self.mine, distance.gather(1, self.own), 0.0)]
        if self.spread:
            parts.append((distance * self.weight).sum(1, keepdim=True))
        # the target is left out: confident rows keep their digits
        exps = distance.neg_().exp_()
        exps.scatter_(1, self.own, torch.where(self.mine, 0.0, exps.gather(1, self.own)))
        sums = torch.cat([exps.sum(1, keepdim=True), *parts], 1)
        dist.all_reduce(sums, group=group)
        others, below, *spreads = sums.split(1, 1)
        return _Shared(highest, others, below, spreads[0] if spreads else torch.zeros_like(others))

    def losses(self, shared: _Shared) -> Tensor:
        """The losses (R,)."""
        log_sum = shared.log_sum
        losses = self.hits * (shared.below + log_sum)
        if self.options.z_loss:  # 0 times Inf is NaN
            losses += self.options.z_loss * (shared.highest + log_sum).square()
        if self.spread:
            losses += self.spread * (self.weight_sum * log_sum + shared.spreads)
        return self._masked(losses)[:, 0]

    def gradient(self, shared: _Shared, upstream: Tensor | None) -> Tensor:
        """The gradient of the logits by the losses times `upstream` (R,), or by their sum."""
        of_loss = torch.ones_like(self.hits) if upstream is None else upstream[:, None]
        hits, spreads = self.hits * of_loss, self.spread * of_loss
        total = shared.others + (-shared.below).exp()
        factor = spreads * self.weight_sum + 2 * self.options.z_loss * of_loss * (
            shared.highest + shared.log_sum
        )
        gradient = (self.z - shared.highest).exp_().mul_((factor + hits) / total)
        of_target = ((-shared.below).exp() * factor - shared.others * hits) / total
        of_own = torch.where(self.mine, of_target, gradient.gather(1, self.own))
        gradient.scatter_(1, self.own, of_own)
        if self.spread:
            gradient -= spreads * self.weight
        gradient *= self.options.logit_scale
        if self.options.softcap:
            gradient *= 1 - (self.z / self.options.softcap).square()
        return self._masked(gradient)

    def _masked(self, values: Tensor) -> Tensor:
        return values.masked_fill_(self.ignored, 0.0).masked_fill_(self.wrong, torch.nan)


def _through_head(
    operands: Operands,
    target: Tensor,
    weight: Tensor | None,
    known: Tensor,
    call: HeadCall,
    shard: Shard,
    upstream: Tensor | None = None,
) -> Outputs:
    """Losses and gradients; `known` (T, 4) receives what the processes share about the rows.

    In backward, where there is an `upstream` gradient of the losses, it holds that already.
    """

    def fill(z: Tensor, where: Where, outputs: Outputs) -> Tensor | None:
        rows = ShardedRows(z, target[where], weight, call.options, shard)
        if upstream is None:
            shared = rows.shared(shard.group)
            known[where] = torch.cat(shared, 1)
            outputs.losses[where] = rows.losses(shared)
        else:
            shared = _Shared(*known[where].split(1, 1))
        if not any(call.needs):
            return None
        return z.copy_(rows.gradient(shared, None if upstream is None else upstream[where]))

    outputs = sweep_one(operands, target, call, fill)
    if call.needs[0]:
        dist.all_reduce(outputs.d_input, group=shard.group)
    return outputs


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        call: HeadCall,
        shard: Shard,
    ) -> Tensor:
        operands = input, linear_weight, linear_bias
        known = input.new_empty(len(input), 4, dtype=statistics_dtype(call.dtype))
        outputs = _through_head(operands, target, weight, known, call, shard)
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in operands)
        ctx.call, ctx.shard, ctx.kept = call, shard, any(call.needs)
        ctx.save_for_backward(
            *(outputs.gradients if ctx.kept else (*operands, target, weight, known))
        )
        return outputs.losses.sum() if call.summed else outputs.losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        needs = ctx.needs_input_grad[:3]
        if ctx.kept:
            results = handed_back(ctx.saved_tensors, needs, ctx.dtypes, upstream)
        else:
            *operands, target, weight, known = ctx.saved_tensors
            call = ctx.call._replace(needs=needs, summed=False)
            outputs = _through_head(operands, target, weight, known, call, ctx.shard, upstream)
            results = handed_back(outputs.gradients, needs, ctx.dtypes)
        return *results, None, None, None, None


@torch._disable_dynamo  # torch.compiler.disable would import all of the compiler
def vocab_parallel_losses(
    operands: Operands, target: Tensor, weight: Tensor | None, call: HeadCall, shard: Shard
) -> Tensor:
    """Losses of a head's rows, or their sum: the same on every process of the group, all of which
    must call it alike.

    Args:
        operands: input (T, H), the same everywhere; linear_weight (V / n, H) and linear_bias (V /
            n,) or None: shards.
        target: (T,), contiguous, the same everywhere.
        weight: of all classes (V,), as `class_weights` returns it.
        call: as `HeadCall.planned` makes it.
        shard: which classes the shards hold.
    """
    # chunks are those of the largest shard, so that all processes have as many
    largest = operands[1][:1].expand(shard.largest, -1)
    call = call._replace(chunk_rows=call.step(len(target), largest))
    return _VocabParallel.apply(*operands, target, weight, call, shard)


class _ShardedLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: RowOptions,
        shard: Shard,
    ) -> Tensor:
        count, dtype = len(logits), statistics_dtype(logits.dtype)
        losses = logits.new_empty(count, dtype=dtype)
        known = logits.new_empty(count, 4, dtype=dtype)
        for chunk in _chunks(logits):
            rows = ShardedRows(logits[chunk], target[chunk], weight, options, shard)
            shared = rows.shared(shard.group)
            known[chunk], losses[chunk] = torch.cat(shared, 1), rows.losses(shared)
        ctx.options, ctx.shard = options, shard
        ctx.save_for_backward(logits, target, weight, known)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("cross_entropy")
        logits, target, weight, known = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for chunk in _chunks(logits):
            rows = ShardedRows(logits[chunk], target[chunk], weight, ctx.options, ctx.shard)
            gradient[chunk] = rows.gradient(_Shared(*known[chunk].split(1, 1)), upstream[chunk])
        return gradient, None, None, None, None


def _chunks(logits: Tensor) -> Iterator[Where]:
    """Slices of rows, so that what is computed on the way stays small."""
    count, classes = logits.shape
    step = chunk_rows(count, classes, statistics_dtype(logits.dtype), logits.device)
    return CountedRows(count).chunks(step)


@torch._disable_dynamo  # torch.compiler.disable would import all of the compiler
def sharded_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions, shard: Shard
) -> Tensor:
    """Losses of rows of logits (T, V / n), the shards of this process; the rest as in
    `vocab_parallel_losses`."""
    return _ShardedLogits.apply(logits, target, weight, options, shard)
