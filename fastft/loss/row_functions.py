"""Any function of the logits of the rows of one head or several, evaluated a chunk at a time.

    z = x_0 W_0^T + b_0 + x_1 W_1^T + ...        of each head; never held as a whole (T, V)
    result = f(z, z', ..., arguments) for each row, or the sum over the chunks

This is the path of whatever the row kernel does not know: f is made of torch functions, and
autograd says what dz is. A sum takes its gradients in the forward pass (3 products of 2 T H V
flops for a head that is trained, 1 for another). A result for each row makes its logits again in
the backward pass (4, and 2), on a CPU only those of the rows that receive a gradient, so that a
mask over gathered log-probabilities saves products.

Where each process has a shard of the classes, z is gathered chunk by chunk, every process computes
f of all classes, and dx is summed over them at the end.

f sees logits in the dtype that torch's would have: where products are emulated in fp32 they are
rounded to it. dW and db are summed in fp32.

Kept for backward: the gradients of a sum, or else the operands. Bytes moved on top of the products'
operands: for each chunk, what f moves, and 2 passes over each dW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastft.loss.head_gemms import HeadTerm
from fastft.loss.head_sweep import CountedRows, Operands, Where, chunk_rows, handed_back, sweep
from fastft.loss.options import refuse_second_derivative, statistics_dtype
from fastft.loss.vocab_parallel import Shard


class _Task(NamedTuple):
    """What is done to the logits of each chunk."""

    function: Callable[..., Tensor]
    layers: tuple[int, ...]  # of how many each head is the sum
    leading: torch.Size  # the shape of the rows
    summed: bool
    rows: CountedRows
    known: Tensor | None
    shards: tuple[Shard | None, ...]  # of each head
    shared: tuple[int, ...]  # which arguments are the same for every row


def _heads(
    layers: tuple[int, ...], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[list[HeadTerm]]:
    """The linear layers, over a matrix of rows, from the flat list that autograd sees."""
    terms = []
    for first in range(0, len(tensors), 3):
        x, weight, bias = (t if t is None else t.detach() for t in tensors[first : first + 3])
        assert x is not None and weight is not None
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        sums = statistics_dtype(weight.dtype)
        of_input, of_weight, of_bias = needs[first : first + 3]
        gradients = (
            rows.new_zeros(rows.shape) if of_input else None,
            weight.new_empty(weight.shape, dtype=sums) if of_weight else None,
            torch.zeros_like(bias, dtype=sums) if of_bias and bias is not None else None,
        )
        terms.append(HeadTerm(rows, weight, bias, x.dtype, gradients))
    left = iter(terms)
    return [[next(left) for _ in range(count)] for count in layers]


def _index(argument: Tensor, where: Where, leading: torch.Size) -> Any:
    """What picks the rows at `where`, of which an argument may have the leading shape."""
    if len(leading) < 2 or argument.shape[:-1] != leading:
        return where
    flat = torch.arange(leading.numel(), device=argument.device)[where]
    return torch.unravel_index(flat, leading)


class _Chunks:
    """The function's results over the chunks, and the gradients of what it reads.

    `upstream`: of the rows' results, whose gradients alone are wanted then.
    """

    def __init__(
        self,
        task: _Task,
        heads: list[list[HeadTerm]],
        arguments: Sequence[Tensor],
        needs: Sequence[bool],
        upstream: Tensor | None,
    ) -> None:
        self.task, self.arguments, self.upstream = task, arguments, upstream
        self.result: Tensor | None = None
        # a leaf over the workspace, or a copy rounded to the dtype that torch's logits have
        self.dtypes = [
            functools.reduce(torch.promote_types, (term.input.dtype for term in terms))
            for terms in heads
        ]
        self.trained = [
            any(gradient is not None for term in terms for gradient in term.gradients)
            for terms in heads
        ]
        self.gradients = [
            argument.new_zeros(
                argument.shape,
                dtype=statistics_dtype(argument.dtype) if at in task.shared else None,
            )
            if need
            else None
            for at, (argument, need) in enumerate(zip(arguments, needs, strict=True))
        ]

    def fill(self, logits: list[Tensor], where: Where) -> list[Tensor | None]:
        """Of `sweep`."""
        heads = zip(logits, self.dtypes, self.trained, self.task.shards, strict=True)
        leaves = []
        for z, dtype, trained, shard in heads:
            rounded = z.detach().to(dtype)
            whole = rounded if shard is None else shard.whole(rounded)
            leaves.append(whole.requires_grad_(trained))
        indices = [
            ... if at in self.task.shared else _index(argument, where, self.task.leading)
            for at, argument in enumerate(self.arguments)
        ]
        for argument, index, gradient in zip(self.arguments, indices, self.gradients, strict=True):
            leaves.append(argument.detach()[index].requires_grad_(gradient is not None))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.set_grad_enabled(bool(wanted)):
            value = self.task.function(*leaves)
        if self.upstream is None:
            self._keep(value.detach(), where)
        if not value.requires_grad:
            return [None] * len(logits)
        upstream = None if self.upstream is None else self.upstream[where]
        given = iter(torch.autograd.grad(value, wanted, upstream, allow_unused=True))
        found = [next(given) if leaf.requires_grad else None for leaf in leaves]
        for gradient, index, part in zip(
            self.gradients, indices, found[len(logits) :], strict=True
        ):
            if gradient is not None and part is not None:
                gradient[index] = part if index is not ... else gradient + part
        return [
            gradient if gradient is None or shard is None else shard.own(gradient)
            for gradient, shard in zip(found, self.task.shards, strict=False)
        ]

    def _keep(self, value: Tensor, where: Where) -> None:
        if self.task.summed:
            self.result = value if self.result is None else self.result + value
            return
        if self.result is None:  # rows that are left out are 0
            self.result = value.new_zeros(self.task.rows.total, *value.shape[1:])
        self.result[where] = value


def _through_heads(
    task: _Task,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The result, and the gradients of `tensors`; those alone where `upstream` is that of rows."""
    count = 3 * sum(task.layers)
    heads = _heads(task.layers, tensors[:count], needs[:count])
    arguments: list[Any] = list(tensors[count:])
    rows = task.rows if upstream is None else task.rows.with_gradient(upstream)
    chunks = _Chunks(task, heads, arguments, needs[count:], upstream)
    weight, shard = heads[0][0].weight, task.shards[0]
    classes = len(weight) if shard is None else shard.classes
    # functions hold several matrices as large as the logits, in fp32 as a rule
    step = chunk_rows(rows.counted, classes * len(heads), torch.float32, weight.device)
    sweep(heads, rows, step, chunks.fill)
    if upstream is None and chunks.result is None:  # no row: the shape and dtype come out right
        nothing = [terms[0].weight.new_empty(0, len(terms[0].weight)) for terms in heads]
        chunks.fill(nothing, slice(0, 0))
    for shard, (term, *_) in zip(task.shards, heads, strict=True):
        if shard is not None and term.gradients[0] is not None:
            dist.all_reduce(term.gradients[0], group=shard.group)
    gradients = [gradient for terms in heads for term in terms for gradient in term.gradients]
    gradients += chunks.gradients
    rows.show_left_out(chunks.result, gradients)
    return chunks.result, [
        gradient if gradient is None or tensor is None else gradient.view(tensor.shape)
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


class _RowFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: _Task, *tensors: Tensor | None) -> Tensor | None:
        ctx.task, needs = task, ctx.needs_input_grad[1:]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        if task.summed and any(needs):
            total, gradients = _through_heads(task, tensors, needs)
            ctx.save_for_backward(*gradients)
            return total
        # the arguments too: torch then sees a change of the targets in place
        ctx.save_for_backward(*tensors)
        if task.known is not None:
            return task.known.clone()
        return _through_heads(task, tensors, [False] * len(tensors))[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused loss")
        needs = ctx.needs_input_grad[1:]
        if ctx.task.summed:
            return None, *handed_back(ctx.saved_tensors, needs, ctx.dtypes, upstream)
        _, gradients = _through_heads(ctx.task, ctx.saved_tensors, needs, upstream)
        return None, *handed_back(gradients, needs, ctx.dtypes)


def _flat(argument: Tensor, leading: torch.Size) -> Tensor:
    """(T, ...), or as it is where that would copy it."""
    if argument.shape[:-1] != leading:
        return argument
    try:
        return argument.view(leading.numel(), argument.shape[-1])
    except RuntimeError:  # no other way tells
        return argument


@torch._disable_dynamo  # torch.compiler.disable would import all of the compiler
def apply_to_rows(
    heads: Sequence[Sequence[Operands]],
    function: Callable[..., Tensor],
    *arguments: Tensor,
    shared: Sequence[int] = (),
    summed: bool = False,
    rows: CountedRows | None = None,
    known: Tensor | None = None,
    shards: Sequence[Shard | None] = (),
) -> Tensor:
    """Computes `function(z, z', ..., *arguments)` of the logits of heads: one result a row, or
    their sum.

    Args:
        heads: of each, input (..., H), weight (V, H) and bias (V,) or None of the linear layers
            that are summed, of one dtype. H may differ; V, and the leading shape of the inputs,
            that of T rows, do not.
        function: gets the logits (R, V) of some rows from each head, and these rows' part of each
            argument; returns the sum over the rows, or a tensor (R, ...).
        arguments: tensors (T, ...), or (..., C) of the rows' leading shape, which get gradients.
        shared: which of the arguments are the same for every row, of whatever shape.
        summed: `function` returns a sum.
        rows: which rows count; the result of the others is 0. None (default): all.
        known: the results of the rows, where they were computed before; only their gradient is
            left to do.
        shards: of each head the classes of which this process has the weights, where it is one
            layer; the others of its group must call alike, with the same inputs. None (default):
            all.
    """
    leading = heads[0][0][0].shape[:-1]
    rows = rows or CountedRows(leading.numel())
    layers, shards = tuple(map(len, heads)), tuple(shards) or (None,) * len(heads)
    task = _Task(function, layers, leading, summed, rows, known, shards, tuple(shared))
    tensors = (tensor for terms in heads for term in terms for tensor in term)
    flat = (one if at in shared else _flat(one, leading) for at, one in enumerate(arguments))
    return _RowFunction.apply(task, *tensors, *flat)
