"""Row-wise expressions over a linear layer: what lazy logits are, and how they get a value.

    logits = x_0 W_0^T + b_0 + x_1 W_1^T + ...      a `Linear`: never held as a whole, T x V
    z      = f_k(... f_1(logits))                   a tree of `Recorded`: casts, softcap, scale, ...
    result = g(z, rows)                             a sum over rows, or one result per row

T rows, V vocabulary, H hidden size. `row_functions` evaluates f and g a chunk of rows at a time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.loss.head_sweep import Operands
from fastft.loss.row_functions import apply_to_rows
from fastft.loss.vocab_parallel import Shard, whole_logits

if TYPE_CHECKING:
    from fastft.loss.lazy.evaluation import Evaluation

AutocastState: TypeAlias = tuple[bool, torch.dtype]


class Recorded(NamedTuple):
    """One function that was called; its arguments may be `Recorded`, `LOGITS` or `MARKED`."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    autocast: AutocastState


class _Place:
    """Where something goes into an expression."""


# the logits of the linear layer (..., V); and the marks of the rows that are padding, (..., 1)
LOGITS, MARKED = _Place(), _Place()
Expression: TypeAlias = Recorded | _Place


def autocast_state(device_type: str) -> AutocastState:
    """Whether autocast is on, and to which dtype."""
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def _autocast(device_type: str, state: AutocastState) -> contextlib.AbstractContextManager:
    if state == autocast_state(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=state[1], enabled=state[0], cache_enabled=False)


def evaluate(
    node: Any,
    logits: Tensor,
    marked: Tensor | None = None,
    known: dict[int, Tensor] | None = None,
) -> Any:
    """The expression `node` with `logits` and `marked` put in.

    `known`: what was evaluated already, so that nothing is that occurs twice. No closure: one that
    calls itself would keep every chunk's logits until garbage is collected.
    """
    known = {} if known is None else known
    if node is LOGITS:
        return logits
    if node is MARKED:
        return marked
    if not isinstance(node, Recorded):
        return node
    if id(node) not in known:
        arguments = [evaluate(argument, logits, marked, known) for argument in node.arguments]
        with _autocast(logits.device.type, node.autocast):
            known[id(node)] = node.function(*arguments, **node.keywords)
    return known[id(node)]


def _versions(terms: tuple[Operands, ...]) -> tuple[int, ...]:
    tensors = (tensor for term in terms for tensor in term if tensor is not None)
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


class Origin(NamedTuple):
    """Where logits come from.

    `vocab`: V, which a weight that was freed does not tell any more. `head`: to be entered again
    for its weight. `check` raises when its shards may not be used; it is told whether the head is
    about to be entered. `evaluation`: whose logits they are; None in training. `shard`: which
    classes the weight has here, where a tensor-parallel plan spreads them; None: all.
    """

    vocab: int
    head: Callable[..., Any] | None = None
    check: Callable[[bool], None] | None = None
    evaluation: Evaluation | None = None
    shard: Shard | None = None


@dataclass(frozen=True, eq=False)
class Linear:
    """The sum of `terms`: every input has the same leading shape, every weight V rows.

    `versions`: of their tensors, when the head ran. `marked`: what an expression puts in for
    `MARKED`, boolean, of the inputs' leading shape and one column.
    """

    terms: tuple[Operands, ...]
    versions: tuple[int, ...]
    origin: Origin
    marked: Tensor | None = None

    @classmethod
    def of(
        cls, *terms: Operands, origin: Origin | None = None, marked: Tensor | None = None
    ) -> Linear:
        """A linear layer over tensors as they are now."""
        return cls(terms, _versions(terms), origin or Origin(terms[0][1].shape[0]), marked)

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
                "optimizer step?), or its input; they were never computed. Read or detach() them "
                "before the step."
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
            origin = Origin(self.origin.vocab, shard=self.origin.shard)
            return task(Linear.of(term, origin=origin, marked=self.marked))

        if head is None:
            raise RuntimeError(_GONE)
        if self.origin.check is not None:
            self.origin.check(True)
        return head(x, fastft_task=run)

    def dense(self) -> Tensor:
        """The logits, in the dtype of the operands: autocast has already had its say on them."""
        with torch.autocast(self.terms[0][0].device.type, enabled=False):
            if self.origin.shard is not None:
                return whole_logits(self.terms[0], self.origin.shard)
            return functools.reduce(torch.add, (F.linear(*term) for term in self.terms))

    def no_rows(self, expression: Expression) -> Tensor:
        """`expression` of no row, (0, V): torch tells its dtype, that of autocast too."""
        with torch.no_grad():
            # the sum of terms of two dtypes (adapters of 32 bits on a head of 16) has torch's
            dtype = functools.reduce(torch.promote_types, (x.dtype for x, _, _ in self.terms))
            nothing = self.terms[0][0].new_empty(0, self.origin.vocab, dtype=dtype)
            return evaluate(expression, nothing, torch.empty_like(nothing[:, :1], dtype=torch.bool))


_GONE = (
    "fastft: the output head's sharded weight is gone, and entering the head does not bring it "
    "back. Use the logits inside the model's forward, or train without fastft's fused loss."
)


def is_freed(weight: Tensor) -> bool:
    """Whether a sharding library has taken the numbers away again."""
    return weight.dim() != 2 or weight.untyped_storage().size() < weight.nbytes


def over_rows(
    linear: Linear,
    expression: Expression,
    function: Callable[..., Tensor],
    *arguments: Tensor,
    **options: Any,
) -> Tensor:
    """`function(z, *arguments)` of the rows z of `expression`; `options` as of `apply_to_rows`."""
    state = autocast_state(linear.terms[0][0].device.type)
    marks = () if linear.marked is None else (linear.marked.reshape(-1, 1),)

    def of_logits(logits: Tensor, *given: Tensor) -> Tensor:
        marked = given[0] if marks else None
        with _autocast(logits.device.type, state):
            return function(evaluate(expression, logits, marked), *given[len(marks) :])

    return linear.inside_head(
        lambda layer: apply_to_rows(
            layer.terms, of_logits, *marks, *arguments, shard=layer.origin.shard, **options
        )
    )
