"""Lazy logits together with others: of another head, of the same one, or with tensors.

A tensor that is one number, or one of each class, is a constant of an expression, as it is now.
Any other that fits the rows becomes an operand of the source: a column (..., 1), such as a
temperature, a mask or a logsumexp, which is copied, and gets its gradient; as many numbers as
logits, which are somebody's anyway; or numbers of the classes (V,) that are trained, such as the
magnitudes of DoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastft.loss.lazy.expressions import (
    Expression,
    Place,
    Recorded,
    are_alike,
    autocast_state,
    replaced,
)
from fastft.loss.lazy.sources import Linear, Source
from fastft.loss.lazy.views import is_logits, on_meta

if TYPE_CHECKING:
    from fastft.loss.lazy.logits import LazyLogits


def logits_among(args: Any, kwargs: Any) -> list[LazyLogits]:
    """The lazy logits of a call, if all are lazy and of one shape; else none."""
    found = [leaf for leaf in tree_leaves((args, kwargs)) if is_logits(leaf)]
    fits = all(
        lazy.is_lazy and not is_stacked(lazy) and lazy.shape == found[0].shape for lazy in found
    )
    return found if fits else []


class _Operands:
    """What stands for arguments in an expression, and the source of it all."""

    def __init__(self, logits: list[LazyLogits], compares: bool) -> None:
        (first, *others), self.compares = logits, compares
        self.shape, self.dtype, self.source = first.shape, first.shadow.dtype, first.source
        self.expressions: dict[int, Expression] = {id(first): first.expression}
        self.fits, self.selections = True, first.recorded.selections
        for lazy in others:
            if id(lazy) not in self.expressions:
                self.source, of_mine, of_theirs = self.source.joined(lazy.source)
                mine = self.expressions.items()
                self.expressions = {key: replaced(node, of_mine) for key, node in mine}
                self.expressions[id(lazy)] = replaced(lazy.expression, of_theirs)

    def of(self, argument: Any) -> Any:
        """What stands for one argument."""
        if id(argument) in self.expressions:
            return self.expressions[id(argument)]
        if isinstance(argument, list | tuple):
            return [self.of(part) for part in argument]
        if not isinstance(argument, Tensor):
            return argument
        again = self.picked_again(argument)
        if again is not None:
            return again
        size, classes = argument.numel(), self.shape[-1]
        is_row = size == 1 or (argument.dim() > 0 and argument.shape[-1] == classes == size)
        if is_row and not argument.requires_grad:
            return argument.reshape(-1 if argument.dim() else ()).clone()
        is_column = size == 1 or argument.shape[-1] == 1
        self.fits &= type(argument) in (Tensor, nn.Parameter)
        self.fits &= argument.device == self.source.device
        self.fits &= argument.dim() > 0 or argument.dtype == self.dtype
        # a gradient of as many numbers as logits is there only for as many numbers
        is_own = is_column or is_row or argument.shape == self.shape
        self.fits &= is_own or not argument.requires_grad
        if not self.fits:
            return None
        if is_row and not is_column:
            whole = argument.reshape(-1)
        else:
            whole = argument.expand(*self.shape[:-1], 1 if is_column else classes)
        self.source = self.source.with_operands([whole.clone() if is_column else whole])
        return Place("operand", len(self.source.operands) - 1)

    def picked_again(self, argument: Tensor) -> Expression | None:
        """What stands for numbers that were picked out of these logits and get no gradient."""
        if argument.requires_grad and not self.compares:
            return None
        if argument.dim() == 0 or (argument.dim() and argument.stride(-1) == 0):
            argument = argument[..., None] if argument.dim() == 0 else argument[..., :1]
        if argument.shape[:-1] != self.shape[:-1]:
            return None
        state = autocast_state(self.source.device.type)
        for picked in self.selections:
            column = picked.column(argument)
            if column is None:
                continue
            node = picked.expression
            if picked.indices is not None:
                index = picked.indices[..., column : column + 1]
                self.source = self.source.with_operands([index])
                place = Place("operand", len(self.source.operands) - 1)
                node = Recorded(torch.gather, (node, -1, place), {}, state)
            return Recorded(Tensor.detach, (node,), {}, state)
        return None


def operands_of(
    logits: list[LazyLogits],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    compares: bool = False,
) -> tuple[Source, tuple[Any, ...], dict[str, Any]] | None:
    """The source of a call, and what stands for its arguments; None if one cannot be an operand.

    `compares`: the call is a comparison, which has no gradient.
    """
    operands = _Operands(logits, compares)
    arguments = tuple(map(operands.of, args))
    keywords = {name: operands.of(value) for name, value in kwargs.items()}
    return (operands.source, arguments, keywords) if operands.fits else None


def together(
    logits: list[LazyLogits],
    expression: Expression,
    shadow: Tensor,
    source: Source,
    is_copy: bool = False,
) -> LazyLogits:
    """Lazy logits made of several; `is_copy` as of `LazyLogits.derived`."""
    result = logits[0].derived(expression, shadow, source, is_copy)
    for lazy in logits:
        lazy._family()._used |= result.requires_grad
    return result


def stack(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`stack` in front or behind, for the mixture of distributions.

    The result has a dimension that is none of the rows, so that only a reduction of it stays lazy.
    """
    parts = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    logits = logits_among(parts, {})
    if not logits or len(logits) < len(parts) or dim not in (0, -1, logits[0].dim()):
        return NotImplemented
    shadow = on_meta(logits[0], func, args, kwargs)
    operands = operands_of(logits, (list(parts),), {})
    if operands is None:
        return NotImplemented
    source, arguments, _ = operands
    state = autocast_state(source.device.type)
    call = Recorded(torch.stack, (*arguments, 0 if dim == 0 else -1), {}, state)
    return together(logits, call, shadow, source)


def is_stacked(lazy: LazyLogits) -> bool:
    """Whether these are stacked logits."""
    node = lazy.expression
    return isinstance(node, Recorded) and node.function is torch.stack


_REDUCTIONS = ("logsumexp", "sum", "mean", "amax", "amin")


def unstacked(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A reduction of stacked logits over the dimension of the stack."""
    assert isinstance(lazy.expression, Recorded)
    name, of_stack = func.__name__, lazy.expression.arguments[1]
    dim = kwargs.get("dim", args[0] if args else None)
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    wanted = (0,) if of_stack == 0 else (-1, lazy.shadow.dim() - 1)
    if name not in _REDUCTIONS or dim not in wanted or len(args) > 1 or kwargs.keys() - {"dim"}:
        return NotImplemented
    shadow = on_meta(lazy, func, (lazy, *args), kwargs)
    state = autocast_state(lazy.recorded.device.type)
    call = Recorded(getattr(torch, name), (lazy.expression, of_stack), {}, state)
    return lazy.derived(call, shadow)


def cat(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of one head, one after the other: those of its inputs."""
    parts = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if not all(is_logits(p) and p.is_lazy and not is_stacked(p) for p in parts):
        return NotImplemented
    first, sources = parts[0], [part.source for part in parts]
    fits = all(
        part.dim() == first.dim() and are_alike(part.expression, first.expression) for part in parts
    ) and all(map(_of_one_head, sources, sources[:1] * len(sources)))
    if not fits or not isinstance(dim, int) or (dim + 1) % first.dim() == 0:
        return NotImplemented
    shadow = on_meta(first, func, args, kwargs)
    dim %= first.dim()
    layers = zip(*(source.heads for source in sources), strict=True)
    heads = tuple(_one_after_the_other(same, dim) for same in layers)
    rows = zip(*(source.operands for source in sources), strict=True)
    source = Source(heads).with_operands(
        same[0] if same[0].dim() == 1 else torch.cat(same, dim) for same in rows
    )
    return together(list(parts), first.expression, shadow, source, is_copy=True)


def _of_one_head(one: Source, other: Source) -> bool:
    one.check_unchanged()
    mine, theirs = ([(h.terms, h.origin.evaluation) for h in s.heads] for s in (one, other))
    widths = [[operand.shape[-1] for operand in source.operands] for source in (one, other)]
    if len(mine) != len(theirs) or widths[0] != widths[1]:
        return False
    if any(a.dim() == 1 and a is not b for a, b in zip(one.operands, other.operands, strict=True)):
        return False  # of the classes, and of all rows
    return all(
        len(terms) == len(others)
        and evaluation is evaluation_of_other
        and all(w is v and b is c for (_, w, b), (_, v, c) in zip(terms, others, strict=True))
        for (terms, evaluation), (others, evaluation_of_other) in zip(mine, theirs, strict=True)
    )


def _one_after_the_other(layers: tuple[Linear, ...], dim: int) -> Linear:
    terms = []
    for same in zip(*(layer.terms for layer in layers), strict=True):
        _, weight, bias = same[0]
        terms.append((torch.cat([x for x, _, _ in same], dim), weight, bias))
    return Linear.of(*terms, origin=layers[0].origin)


def broadcast(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`broadcast_tensors`, where the lazy logits have the common shape."""
    parts = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    logits = logits_among(parts, {})
    if not logits or torch.broadcast_shapes(*(part.shape for part in parts)) != logits[0].shape:
        return NotImplemented
    shape = logits[0].shape
    return tuple(
        part if any(part is lazy for lazy in logits) else part.expand(shape) for part in parts
    )
