"""What lazy logits are made of: the linear layers of one head or several, and operands of the rows.

    logits = x_0 W_0^T + b_0 + x_1 W_1^T + ...      a `Linear`: never held as a whole, T x V
    source = the logits of a head, of another (a teacher's), ..., operands (..., C) of the same rows

T rows, V vocabulary, H hidden size, which differs between heads; C is 1 (temperatures, masks, a
logsumexp) or V (probabilities that somebody holds). An operand (V,) is the same for every row: what
an adapter trains of each class. `over_rows` evaluates an expression of a source by `row_functions`,
a chunk of rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.loss.head_sweep import Operands
from fastft.loss.lazy.expressions import (
    Expression,
    Place,
    Recorded,
    autocast_state,
    autocasting,
    evaluate,
)
from fastft.loss.lazy.selections import Selection
from fastft.loss.row_functions import apply_to_rows
from fastft.loss.vocab_parallel import Shard, whole_logits

if TYPE_CHECKING:
    from fastft.loss.lazy.evaluation import Evaluation, Held


def _versions(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple(
        0 if tensor.is_inference() else tensor._version for tensor in tensors if tensor is not None
    )


def _share(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same numbers in the same memory, with one history at most."""
    if one is None or other is None or one is other:
        return one is other
    mine, theirs = (
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype)
        for t in (one, other)
    )
    # a tensor and its views have one history
    bases = [t if t._base is None else t._base for t in (one, other)]
    both = one.requires_grad and other.requires_grad
    return mine == theirs and (not both or bases[0] is bases[1])


class Origin(NamedTuple):
    """Where logits come from.

    `vocab`: V, which a weight that was freed does not tell any more. `head`: to be entered again
    for its weight. `check` raises when its shards may not be used; it is told whether the head is
    about to be entered. `evaluation`: whose logits they are; None in training. `held`: which
    remembers those without a history that must be numbers before the weight changes. `shard`: which
    classes the weight has here, where a tensor-parallel plan spreads them; None: all.
    """

    vocab: int
    head: Callable[..., Any] | None = None
    check: Callable[[bool], None] | None = None
    evaluation: Evaluation | None = None
    held: Held | None = None
    shard: Shard | None = None


@dataclass(frozen=True, eq=False)
class Linear:
    """The sum of `terms`: every input has the same leading shape, every weight V rows.

    `versions`: of their tensors, when the head ran.
    """

    terms: tuple[Operands, ...]
    versions: tuple[int, ...]
    origin: Origin

    @classmethod
    def of(cls, *terms: Operands, origin: Origin | None = None) -> Linear:
        """A linear layer over tensors as they are now."""
        tensors = (tensor for term in terms for tensor in term)
        return cls(terms, _versions(tensors), origin or Origin(terms[0][1].shape[0]))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The terms, one after another."""
        return tuple(tensor for term in self.terms for tensor in term)

    @property
    def requires_grad(self) -> bool:
        """Whether any of them does."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: a sum of two dtypes (adapters of 32 bits on a head of 16) has torch's."""
        return functools.reduce(torch.promote_types, (x.dtype for x, _, _ in self.terms))

    def with_inputs(self, change: Callable[[Tensor], Tensor]) -> Linear:
        """The layer over changed inputs: a view or a selection of rows."""
        terms = ((change(x), weight, bias) for x, weight, bias in self.terms)
        return Linear.of(*terms, origin=self.origin)

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
        held = self.origin.held or other.origin.held
        return Linear.of(*self.terms, *more, origin=self.origin._replace(head=None, held=held))

    def plus_bias(self, extra: Tensor) -> Linear:
        """The sum with one more bias (V,), trained or not."""
        self.check_unchanged()
        (x, weight, bias), *more = self.terms
        bias = extra if bias is None else bias + extra
        return Linear.of((x, weight, bias), *more, origin=self.origin._replace(head=None))

    def shares_with(self, other: Linear) -> bool:
        """Whether both give the same logits because they are made of the same numbers."""
        mine, theirs = self.tensors, other.tensors
        return len(mine) == len(theirs) and all(map(_share, mine, theirs))

    def detached(self) -> Linear:
        """The same numbers without their history; the very same layer where there is none."""
        if not self.requires_grad:
            return self
        terms = (
            (x.detach(), w.detach(), None if b is None else b.detach()) for x, w, b in self.terms
        )
        return replace(self, terms=tuple(terms))

    def check_unchanged(self) -> None:
        """Raises RuntimeError when a tensor is not what it was when the head ran."""
        if self.origin.check is not None:
            self.origin.check(False)
        if self.versions != _versions(self.tensors):
            raise RuntimeError(
                "fastft: these logits are read after the output head's weight was changed (an "
                "optimizer step?), or its input; they were never computed. Read or detach() them "
                "before the step."
            )

    @property
    def is_freed(self) -> bool:
        """Whether a sharding library has taken the numbers of a weight away again."""
        return any(_is_freed(weight) for _, weight, _ in self.terms)

    @property
    def is_whole(self) -> bool:
        """Whether all of the weights is here: nothing freed, and no other process has classes."""
        return self.origin.shard is None and not self.is_freed

    def inside_head(self, task: Callable[[Linear], Any]) -> Any:
        """`task` of a layer whose weight is there.

        FSDP2 and ZeRO-3 free the gathered weight of a head that is a unit of its own as soon as its
        forward is over; then the head is entered again, so that its own hooks gather it, and `task`
        runs in there.
        """
        if not self.is_freed:
            return task(self)
        head, x = self.origin.head, self.terms[0][0]

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if _is_freed(weight):
                raise RuntimeError(_GONE)
            term = x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
            return task(Linear.of(term, origin=Origin(self.origin.vocab, shard=self.origin.shard)))

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


_GONE = (
    "fastft: the output head's sharded weight is gone, and entering the head does not bring it "
    "back. Use the logits inside the model's forward, or train without fastft's fused loss."
)


def _is_freed(weight: Tensor) -> bool:
    return weight.dim() != 2 or weight.untyped_storage().size() < weight.nbytes


@dataclass(frozen=True, eq=False)
class Source:
    """The `heads` and `operands` of an expression, all of the same leading shape, or (V,).

    `versions`: of the operands, when they came in. `selections`: what was picked out of expressions
    of it, by logits that share the list.
    """

    heads: tuple[Linear, ...]
    operands: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()
    selections: list[Selection] = field(default_factory=list)

    @property
    def head(self) -> Linear:
        """The first, where the origin is looked up, and often the only one."""
        return self.heads[0]

    @property
    def is_single(self) -> bool:
        """Whether it is one head and nothing else."""
        return len(self.heads) == 1 and not self.operands

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.head.terms[0][0].device

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, as autograd sees them."""
        return tuple(tensor for head in self.heads for tensor in head.tensors) + self.operands

    def with_tensors(self, tensors: Sequence[Any]) -> Source:
        """The same of others."""
        left, heads = iter(tensors), []
        for head in self.heads:
            terms = [(next(left), next(left), next(left)) for _ in head.terms]
            heads.append(Linear.of(*terms, origin=head.origin))
        return Source(tuple(heads)).with_operands(left)

    def with_operands(self, operands: Iterable[Tensor]) -> Source:
        """The same with more operands, as they are now."""
        more = tuple(operands)
        return replace(
            self,
            operands=(*self.operands, *more),
            versions=(*self.versions, *_versions(more)),
            selections=list(self.selections),  # others may have other operands in these places
        )

    def with_inputs(self, change: Callable[[Tensor], Tensor]) -> Source:
        """A view or a selection of the rows."""
        self.check_unchanged()
        heads = tuple(head.with_inputs(change) for head in self.heads)
        # one of the classes has no rows; or it is that of one row, and stays so
        operands = (operand if operand.dim() == 1 else change(operand) for operand in self.operands)
        return Source(heads).with_operands(operands)

    def with_head(self, head: Linear) -> Source:
        """The same of another first head."""
        return replace(self, heads=(head, *self.heads[1:]), selections=[])

    def joined(
        self, other: Source
    ) -> tuple[Source, dict[Place, Expression], dict[Place, Expression]]:
        """Both, and what stands for the places of each. A head that both have is there once."""
        heads = list(self.heads)
        of_mine: dict[Place, Expression] = {}
        of_theirs: dict[Place, Expression] = {}
        for index, head in enumerate(other.heads):
            at = next((at for at, mine in enumerate(heads) if mine.shares_with(head)), len(heads))
            place = Place("head", at)
            detached = Recorded(Tensor.detach, (place,), {}, autocast_state(self.device.type))
            of_theirs[Place("head", index)] = place
            if at == len(heads):
                heads.append(head)
            elif head.requires_grad and not heads[at].requires_grad:
                heads[at], of_mine[place] = head, detached
            elif heads[at].requires_grad and not head.requires_grad:
                of_theirs[Place("head", index)] = detached
        operands, versions = list(self.operands), list(self.versions)
        for index, (operand, version) in enumerate(
            zip(other.operands, other.versions, strict=True)
        ):
            known = zip(operands, versions, strict=True)
            both = [a is operand and then == version for a, then in known]
            at = both.index(True) if any(both) else len(operands)
            if at == len(operands):
                operands.append(operand)
                versions.append(version)
            of_theirs[Place("operand", index)] = Place("operand", at)
        source = Source(tuple(heads), tuple(operands), tuple(versions), list(self.selections))
        return source, of_mine, of_theirs

    def detached(self) -> Source:
        """The same numbers without their history; the very same where there is none."""
        if not any(tensor is not None and tensor.requires_grad for tensor in self.tensors):
            return self
        heads = tuple(head.detached() for head in self.heads)
        operands = tuple(operand.detach() for operand in self.operands)
        return replace(self, heads=heads, operands=operands)

    def check_unchanged(self) -> None:
        """Raises RuntimeError when a tensor is not what it was."""
        for head in self.heads:
            head.check_unchanged()
        if self.versions != _versions(self.operands):
            raise RuntimeError(
                "fastft: a tensor was changed in place after lazy logits were combined with it, "
                "and before the result was computed. Change a copy of it, or reduce the result "
                "over the vocabulary before."
            )

    def inside_heads(
        self, task: Callable[[Source], Tensor], entered: tuple[Linear, ...] = ()
    ) -> Tensor:
        """`task` of the source whose weights are there: see `Linear.inside_head`."""
        left = self.heads[len(entered) :]
        if not left:
            return task(replace(self, heads=entered))
        return left[0].inside_head(lambda layer: self.inside_heads(task, (*entered, layer)))

    def dense(self, expression: Expression) -> Tensor:
        """`expression` of all rows."""
        return evaluate(expression, [head.dense() for head in self.heads], self.operands)

    def no_rows(self, expression: Expression) -> Tensor:
        """`expression` of no row: torch tells its dtype, that of autocast too."""
        x = self.head.terms[0][0]
        with torch.no_grad():
            nothing = [x.new_empty(0, h.origin.vocab, dtype=h.dtype) for h in self.heads]
            operands = [operand.new_empty(0, operand.shape[-1]) for operand in self.operands]
            return evaluate(expression, nothing, operands)


def over_rows(
    source: Source,
    expression: Expression,
    function: Callable[..., Tensor],
    *arguments: Tensor,
    **options: Any,
) -> Tensor:
    """`function(z, *arguments)` of the rows z of `expression`; `options` as of `apply_to_rows`."""
    state = autocast_state(source.device.type)
    heads, known = len(source.heads), len(source.heads) + len(source.operands)

    def of_logits(*given: Tensor) -> Tensor:
        with autocasting(given[0].device.type, state):
            z = evaluate(expression, given[:heads], given[heads:known])
            return function(z, *given[known:])

    return source.inside_heads(
        lambda there: apply_to_rows(
            [layer.terms for layer in there.heads],
            of_logits,
            *there.operands,
            *arguments,
            shards=[layer.origin.shard for layer in there.heads],
            shared=[at for at, operand in enumerate(there.operands) if operand.dim() == 1],
            **options,
        )
    )
