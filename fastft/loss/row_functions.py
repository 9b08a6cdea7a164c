"""Any function of the logits of a head's rows, evaluated a chunk of rows at a time.

    z = x_0 W_0^T + b_0 + x_1 W_1^T + ...        never held as a whole (T, V)
    result = f(z, arguments) for each row, or the sum of f(z, arguments) over the chunks

This is the path of whatever the row kernel does not know: f is made of torch functions, and
autograd says what dz is. A sum takes its gradients in the forward pass (3 products of 2 T H V
flops). A result for each row makes its logits again in the backward pass (4), on a CPU only those
of the rows that receive a gradient, so that a mask over gathered log-probabilities saves products.

Where each process has a shard of the classes, z is gathered chunk by chunk, every process computes
f of all classes, and dx is summed over them at the end.

f sees logits in the dtype that torch's would have: where products are emulated in fp32 they are
rounded to it. dW and db are summed in fp32.

Kept for backward: the gradients of a sum, or else the operands. Bytes moved on top of the products'
operands: for each chunk, what f moves, and 2 passes over dW.
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
    arguments: tuple[Tensor, ...]  # each (T, ...)
    summed: bool
    rows: CountedRows
    known: Tensor | None
    shard: Shard | None


def _terms(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[HeadTerm]:
    """The linear layers, over a matrix of rows, from the flat list that autograd sees."""
    terms = []
    for first in range(0, len(tensors), 3):
        x, weight, bias = (t if t is None else t.detach() for t in tensors[first : first + 3])
        assert x is not None and weight is not None
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        sums = statistics_dtype(weight.dtype)
        of_input, of_weight, of_bias = needs[first : first + 3]
        gradients = (
            torch.zeros_like(rows) if of_input else None,
            torch.empty_like(weight, dtype=sums) if of_weight else None,
            torch.zeros_like(bias, dtype=sums) if of_bias and bias is not None else None,
        )
        terms.append(HeadTerm(rows, weight, bias, x.dtype, gradients))
    return terms


def _through_head(
    task: _Task,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The result, and the gradients of `tensors`; those alone where `upstream` is that of rows."""
    terms, wants = _terms(tensors, needs), any(needs)
    dtype = functools.reduce(torch.promote_types, (term.input.dtype for term in terms))
    weight, result, shard = terms[0].weight, None, task.shard
    rows = task.rows if upstream is None else task.rows.with_gradient(upstream)

    def fill(z: Tensor, where: Where) -> Tensor | None:
        nonlocal result
        # a leaf over the workspace, or a copy rounded to the dtype that torch's logits have
        logits = z.detach().to(dtype)
        logits = (logits if shard is None else shard.whole(logits)).requires_grad_(wants)
        with torch.set_grad_enabled(wants):
            value = task.function(logits, *(argument[where] for argument in task.arguments))
        if upstream is None and task.summed:
            result = value.detach() if result is None else result + value.detach()
        elif upstream is None:
            # rows that are left out are 0
            result = value.new_zeros(rows.total, *value.shape[1:]) if result is None else result
            result[where] = value.detach()
        if not value.requires_grad:
            return None
        of_rows = None if upstream is None else upstream[where]
        gradient = torch.autograd.grad(value, logits, of_rows)[0]
        return gradient if shard is None else shard.own(gradient)

    # functions hold several matrices as large as the logits, in fp32 as a rule
    classes = len(weight) if shard is None else shard.classes
    sweep(terms, rows, chunk_rows(rows.counted, classes, torch.float32, weight.device), fill)
    if upstream is None and result is None:  # no row: shapes and dtypes come out right all the same
        fill(weight.new_empty(0, len(weight)), slice(0, 0))
    for of_input, *_ in (term.gradients for term in terms):
        if shard is not None and of_input is not None:
            dist.all_reduce(of_input, group=shard.group)
    gradients = [gradient for term in terms for gradient in term.gradients]
    rows.show_left_out(result, gradients)
    return result, [
        gradient if gradient is None or tensor is None else gradient.view(tensor.shape)
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


class _RowFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: _Task, *tensors: Tensor | None) -> Tensor | None:
        ctx.task, needs = task, ctx.needs_input_grad[1:]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        if task.summed and any(needs):
            total, gradients = _through_head(task, tensors, needs)
            ctx.save_for_backward(*gradients)
            return total
        # the arguments too: torch then sees a change of the targets in place
        ctx.save_for_backward(*tensors, *task.arguments)
        if task.known is not None:
            return task.known.clone()
        return _through_head(task, tensors, [False] * len(tensors))[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused loss")
        needs = ctx.needs_input_grad[1:]
        if ctx.task.summed:
            return None, *handed_back(ctx.saved_tensors, needs, ctx.dtypes, upstream)
        _, gradients = _through_head(ctx.task, ctx.saved_tensors[: len(needs)], needs, upstream)
        return None, *handed_back(gradients, needs, ctx.dtypes)


@torch._disable_dynamo  # torch.compiler.disable would import all of the compiler
def apply_to_rows(
    terms: Sequence[Operands],
    function: Callable[..., Tensor],
    *arguments: Tensor,
    summed: bool = False,
    rows: CountedRows | None = None,
    known: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Computes `function(z, *arguments)` of a head's logits z: one result a row, or their sum.

    Args:
        terms: input (..., H), weight (V, H) and bias (V,) or None of each linear layer of the head,
            of one dtype; every input has the same leading shape, that of T rows.
        function: gets the logits (R, V) of some rows, and their part of each argument; returns
            the sum over these rows, or a tensor (R, ...).
        arguments: tensors (T, ...), which get no gradient.
        summed: `function` returns a sum.
        rows: which rows count; the result of the others is 0. None (default): all.
        known: the results of the rows, where they were computed before; only their gradient is
            left to do.
        shard: the classes of which this process has the weights; the others of its group must call
            alike, with the same inputs. None (default): all.
    """
    rows = rows or CountedRows(terms[0][0].shape[:-1].numel())
    tensors = (tensor for term in terms for tensor in term)
    return _RowFunction.apply(_Task(function, arguments, summed, rows, known, shard), *tensors)
