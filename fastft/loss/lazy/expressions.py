"""Row-wise expressions over a linear layer, evaluated a chunk of rows at a time.

    logits = x_0 W_0^T + b_0 + x_1 W_1^T + ...      a `Linear`: never held as a whole, T x V
    z      = f_k(... f_1(logits))                   a tree of `Call`s: casts, softcap, scale, log-softmax, ...
    result = g(z, rows)                             a sum over rows, or one result per row

T rows, V vocabulary, H hidden size. Each chunk makes its own logits, C x V with C >= 256 (on a
device 1024, as in `head_sweep`), so a pass holds a workspace of a few C x V instead of several T x
V. A summed result takes its gradients in the forward pass (three GEMMs); a result per row makes its
logits again in the backward pass (four GEMMs). The weight's gradient is summed over chunks in fp32.

This is the path for whatever `linear_cross_entropy` does not know; it is made of torch operations
alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.loss.head_gemms import add_weight_gradient
from fastft.loss.head_sweep import chunk_rows
from fastft.loss.options import refuse_second_derivative, unrounded

if TYPE_CHECKING:
    from fastft.loss.lazy.evaluation import Evaluation

WORKSPACE_BYTES = 64 << 20
MIN_CHUNK_ROWS = 256

Term: TypeAlias = tuple[Tensor, Tensor, "Tensor | None"]
AutocastState: TypeAlias = tuple[bool, torch.dtype]


class Call(NamedTuple):
    """One recorded function; its arguments may be `Call`s themselves, `LOGITS` or `MARKED`."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    autocast: AutocastState


class _Logits:
    """The place in an expression where the logits of the linear layer go in."""


class _Marked:
    """The place where the marks of the rows go in, (..., 1): which rows are padding."""


LOGITS, MARKED = _Logits(), _Marked()
Expression: TypeAlias = Call | _Logits


def autocast_state(device_type: str) -> AutocastState:
    """Whether autocast is on, and to which dtype."""
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def _autocast(device_type: str, state: AutocastState) -> contextlib.AbstractContextManager:
    if state == autocast_state(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=state[1], enabled=state[0], cache_enabled=False)


def evaluate(expression: Expression, logits: Tensor, marked: Tensor | None = None) -> Tensor:
    """`expression` with `logits` and `marked` put in; a sub-expression that occurs twice is
    evaluated once."""
    return _value(expression, logits, marked, {})


def _value(node: Any, logits: Tensor, marked: Tensor | None, known: dict[int, Tensor]) -> Any:
    """No closure: a function that calls itself would keep every chunk's logits until garbage is
    collected."""
    if node is LOGITS:
        return logits
    if node is MARKED:
        return marked
    if not isinstance(node, Call):
        return node
    if id(node) not in known:
        arguments = [_value(argument, logits, marked, known) for argument in node.arguments]
        with _autocast(logits.device.type, node.autocast):
            known[id(node)] = node.function(*arguments, **node.keywords)
    return known[id(node)]


def _versions(terms: tuple[Term, ...]) -> tuple[int, ...]:
    tensors = (tensor for term in terms for tensor in term if tensor is not None)
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


class Origin(NamedTuple):
    """Where logits come from: the head, to be entered again, and what raises when its shards may
    not be used.

    `check` is told whether the head is about to be entered. `evaluation`: whose logits they are;
    None in training.
    """

    vocab: int
    head: Callable[..., Any] | None = None
    check: Callable[[bool], None] | None = None
    evaluation: Evaluation | None = None


@dataclass(frozen=True, eq=False)
class Linear:
    """The sum of `terms` (input, weight, bias or None); every input has the same leading shape,
    every weight V rows.

    `marked`: what an expression puts in for `MARKED`, boolean, with the inputs' leading shape and
        one column.
    """

    terms: tuple[Term, ...]
    versions: tuple[int, ...]
    origin: Origin
    marked: Tensor | None = None

    @classmethod
    def of(cls, *terms: Term, origin: Origin | None = None, marked: Tensor | None = None) -> Linear:
        """A linear layer over tensors as they are now."""
        return cls(terms, _versions(terms), origin or Origin(terms[0][1].shape[0]), marked)

    @property
    def vocab(self) -> int:
        """V, which a weight that was freed does not tell any more."""
        return self.origin.vocab

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: torch's of the sum, where terms differ (adapters of 32 bits on a head of
        16)."""
        dtypes = (x.dtype for x, _, _ in self.terms)
        return functools.reduce(torch.promote_types, dtypes)

    @property
    def leading_shape(self) -> torch.Size:
        """The shape of the logits without the vocabulary."""
        return self.terms[0][0].shape[:-1]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The terms, one after another."""
        return tuple(tensor for term in self.terms for tensor in term)

    def with_inputs(self, change: Callable[[Tensor], Tensor]) -> Linear:
        """The layer over changed inputs: a view or a selection of rows."""
        self.check_unchanged()
        terms = ((change(x), weight, bias) for x, weight, bias in self.terms)
        marked = None if self.marked is None else change(self.marked)
        return Linear.of(*terms, origin=self.origin, marked=marked)

    def plus(self, other: Linear, scale: float = 1.0) -> Linear:
        """The sum with `scale` times another layer (base head + LoRA)."""
        self.check_unchanged()
        other.check_unchanged()
        more = other.terms
        if scale != 1.0:
            more = tuple(
                (x * scale, weight, None if bias is None else bias * scale)
                for x, weight, bias in more
            )
        return Linear.of(*self.terms, *more, origin=self.origin._replace(head=None))

    def plus_bias(self, extra: Tensor) -> Linear:
        """The sum with one more bias (V,), trained or not."""
        self.check_unchanged()
        (x, weight, bias), *more = self.terms
        bias = extra if bias is None else bias + extra
        return Linear.of((x, weight, bias), *more, origin=self.origin._replace(head=None))

    def same_as(self, other: Linear) -> bool:
        """Whether both give the same logits because they are made of the same tensors."""
        mine, theirs = (*self.tensors, self.marked), (*other.tensors, other.marked)
        return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))

    def detached(self) -> Linear:
        """The same numbers without their history; the very same layer where there is none."""
        if not any(tensor is not None and tensor.requires_grad for tensor in self.tensors):
            return self
        terms = (
            (x.detach(), w.detach(), None if b is None else b.detach()) for x, w, b in self.terms
        )
        return replace(self, terms=tuple(terms))

    def check_unchanged(self) -> None:
        """Raises RuntimeError when a tensor is not what it was when the head ran."""
        if self.origin.check is not None:
            self.origin.check(False)
        if self.versions != _versions(self.terms):
            raise RuntimeError(
                "fastft: these logits are read after the output head's weight was changed (an "
                "optimizer step?), or its "
                "input; they were never computed. Read or detach() them before the step."
            )

    def inside_head(self, task: Callable[[Linear], Tensor]) -> Tensor:
        """`task` of a layer whose weight is there.

        FSDP2 and ZeRO-3 free the gathered weight of a head that is a unit of its own as soon as its
        forward is over; then the head is entered again, so that its own hooks gather it, and `task`
        runs in there.
        """
        if not any(is_freed(weight) for _, weight, _ in self.terms):
            return task(self)
        head, x = self.origin.head, self.terms[0][0]

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if is_freed(weight):
                raise RuntimeError(_GONE)
            term = x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
            return task(Linear.of(term, marked=self.marked))

        if head is None:
            raise RuntimeError(_GONE)
        if self.origin.check is not None:
            self.origin.check(True)
        return head(x, fastft_task=run)

    def dense(self) -> Tensor:
        """The logits."""
        return _linear(self.terms)

    def no_rows(self, expression: Expression) -> Tensor:
        """`expression` of logits of no row at all, (0, V): what asks torch for dtypes, those of
        autocast too."""
        with torch.no_grad():
            nothing = self.terms[0][0].new_empty(0, self.vocab, dtype=self.dtype)
            return evaluate(expression, nothing, torch.empty_like(nothing[:, :1], dtype=torch.bool))


_GONE = (
    "fastft: the output head's sharded weight is gone, and entering the head does not bring it "
    "back. Use the logits "
    "inside the model's forward, or train without fastft's fused loss."
)


def is_freed(weight: Tensor) -> bool:
    """Whether a sharding library has taken the numbers away again."""
    return (
        weight.dim() != 2
        or weight.untyped_storage().size() < weight.numel() * weight.element_size()
    )


def _linear(terms: tuple[Term, ...], rows: slice | None = None) -> Tensor:
    """The logits (of some rows) in the dtype of the operands, which autocast has already had its
    say on."""
    total = None
    with torch.autocast(terms[0][0].device.type, enabled=False):
        for x, weight, bias in terms:
            part = F.linear(x if rows is None else x[rows], weight, bias)
            total = part if total is None else total + part
    assert total is not None
    return total


@dataclass(frozen=True, eq=False)
class _Task:
    """What `_RowWise` does to each chunk: `function(expression(logits), *row_arguments)`."""

    function: Callable[..., Tensor]
    expression: Expression
    summed: bool
    row_arguments: tuple[Tensor, ...]
    autocast: AutocastState
    known: Tensor | None = None
    marked: Tensor | None = None

    def run(self, logits: Tensor, rows: slice) -> Tensor:
        marked = None if self.marked is None else self.marked[rows]
        with _autocast(logits.device.type, self.autocast):
            z = evaluate(self.expression, logits, marked)
            return self.function(z, *(rows_of[rows] for rows_of in self.row_arguments))


def _terms(tensors: tuple[Tensor | None, ...]) -> tuple[Term, ...]:
    """The flat list that autograd sees, as terms over a matrix of rows."""
    terms = []
    for x, weight, bias in zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True):
        assert x is not None and weight is not None
        terms.append(
            (
                x.detach().reshape(-1, x.shape[-1]),
                weight.detach(),
                None if bias is None else bias.detach(),
            )
        )
    return tuple(terms)


def _chunks(terms: tuple[Term, ...]) -> Iterator[slice]:
    """Slices of rows; one empty slice where there is no row, so that shapes and dtypes come out
    right."""
    count, vocab = terms[0][0].shape[0], terms[0][1].shape[0]
    if terms[0][0].device.type == "cpu":
        size = max(MIN_CHUNK_ROWS, WORKSPACE_BYTES // (4 * max(vocab, 1)))
    else:
        size = chunk_rows(count, vocab, torch.float32, terms[0][0].device) or 1
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))


def _accumulator(index: int, tensor: Tensor) -> Tensor:
    """Where a gradient is collected. Rows of x are written once; W and b are summed over chunks,
    hence in fp32."""
    narrow = index % 3 != 0 and tensor.element_size() < 4
    return torch.zeros(
        tensor.shape, dtype=torch.float32 if narrow else tensor.dtype, device=tensor.device
    )


def _differentiate(
    task: _Task,
    tensors: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    grad_output: Tensor | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The sum of a summed task and the gradients of `tensors`; `grad_output` holds a row for each
    row otherwise."""
    terms = _terms(tensors)
    gradients = [
        _accumulator(index, tensor) if need and tensor is not None else None
        for index, (tensor, need) in enumerate(zip(tensors, needs, strict=True))
    ]
    total = None
    for rows in _chunks(terms):
        result = _differentiate_chunk(
            task, terms, rows, gradients, None if grad_output is None else grad_output[rows]
        )
        if grad_output is None:
            total = result if total is None else total + result
    return total, gradients


def _differentiate_chunk(
    task: _Task,
    terms: tuple[Term, ...],
    rows: slice,
    gradients: list[Tensor | None],
    grad_output: Tensor | None,
) -> Tensor:
    """The result of some rows; their gradients are collected. A function, so that the next chunk
    finds no logits."""
    logits = _linear(terms, rows).requires_grad_()
    with torch.enable_grad():
        result = task.run(logits, rows)
    if result.requires_grad:
        (grad_logits,) = torch.autograd.grad(result, logits, grad_output)
        with torch.autocast(logits.device.type, enabled=False):
            _collect(gradients, terms, rows, grad_logits)
    return result.detach()


def _collect(
    gradients: list[Tensor | None], terms: tuple[Term, ...], rows: slice, grad_logits: Tensor
) -> None:
    for index, (x, weight, _) in enumerate(terms):
        grad_x, grad_weight, grad_bias = gradients[3 * index : 3 * index + 3]
        # what torch's sum of terms of two dtypes hands to the narrower one
        grad_term = grad_logits.to(x.dtype)
        if grad_x is not None:
            grad_x.view(-1, grad_x.shape[-1])[rows] = grad_term @ weight
        if grad_weight is not None and (grad_weight.dtype == x.dtype or not x.is_cpu):
            add_weight_gradient(grad_weight, grad_term, x[rows])
        elif grad_weight is not None:
            grad_weight += grad_term.T @ x[rows]
        if grad_bias is not None:
            grad_bias += grad_term.sum(0, dtype=grad_bias.dtype)


class _RowWise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: _Task, *tensors: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        ctx.task = task
        if task.summed and any(needs):
            total, ctx.gradients = _differentiate(task, tensors, needs, None)
            assert total is not None
            return total
        # torch then sees a change of the targets in place
        ctx.save_for_backward(*tensors, *task.row_arguments)
        if task.known is not None:
            return task.known.clone()
        terms = _terms(tensors)
        pieces = [task.run(_linear(terms, rows), rows) for rows in _chunks(terms)]
        return torch.stack(pieces).sum(0) if task.summed else torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused loss")
        if ctx.task.summed:
            gradients = [
                None if g is None else (g * unrounded(grad_output)).to(g.dtype)
                for g in ctx.gradients
            ]
        else:
            needs = ctx.needs_input_grad[1:]
            _, gradients = _differentiate(
                ctx.task, ctx.saved_tensors[: len(needs)], needs, grad_output
            )
        return None, *gradients


def sum_over_rows(
    linear: Linear, expression: Expression, function: Callable[..., Tensor], *row_arguments: Tensor
) -> Tensor:
    """`sum over chunks of function(z, *row_arguments)`: `function` returns the sum over the rows it
    is given."""
    return _apply(linear, expression, function, True, row_arguments)


def map_rows(
    linear: Linear,
    expression: Expression,
    function: Callable[..., Tensor],
    *row_arguments: Tensor,
    known: Tensor | None = None,
) -> Tensor:
    """`function(z, *row_arguments)`, which returns one result (of any shape) for each row, for all
    T rows.

    `known`: these results, where they were computed before; only their gradient is left to do.
    """
    return _apply(linear, expression, function, False, row_arguments, known)


def _apply(
    linear: Linear,
    expression: Expression,
    function: Callable[..., Tensor],
    summed: bool,
    row_arguments: tuple[Tensor, ...],
    known: Tensor | None = None,
) -> Tensor:
    autocast = autocast_state(linear.terms[0][0].device.type)
    marked = None if linear.marked is None else linear.marked.reshape(-1, 1)
    task = _Task(function, expression, summed, row_arguments, autocast, known, marked)
    return linear.inside_head(lambda layer: _RowWise.apply(task, *layer.tensors))
