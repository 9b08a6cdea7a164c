"""Losses of lazy logits and reductions over their vocabulary, evaluated a chunk of rows at a time.

A rule that is not sure returns `NotImplemented`: the logits are then materialised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.loss.counted_labels import bound_of
from fastft.loss.head_sweep import CountedRows
from fastft.loss.lazy.expressions import (
    Expression,
    Recorded,
    ScaleAndSoftcap,
    autocast_state,
    scale_and_softcap,
)
from fastft.loss.lazy.selections import Selection
from fastft.loss.lazy.shortcuts import picked, summed
from fastft.loss.lazy.sources import Linear
from fastft.loss.lazy.views import on_meta, with_strides_of
from fastft.loss.linear_cross_entropy import linear_cross_entropy
from fastft.loss.options import sum_of_counted

if TYPE_CHECKING:
    from fastft.loss.lazy.logits import LazyLogits

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_last(lazy: LazyLogits, dim: Any) -> bool:
    """Whether `dim` is the vocabulary."""
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, lazy.shadow.dim() - 1)


def reduce(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`logsumexp`, `sum`, `argmax`, ... over the vocabulary; `sum` and `mean` of everything."""
    name = func.__name__
    if name in ("sum", "mean") and not args and kwargs.keys() <= {"dtype"}:
        return total(lazy, name, kwargs.get("dtype"))
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    if not is_last(lazy, dim) or "out" in kwargs:
        return NotImplemented
    result = None
    # which asks for the best token and no more
    if name in ("logsumexp", "argmax") and not lazy.is_evaluated:
        result = _kept(lazy, name)
    elif name in ("sum", "mean") and kwargs.get("dtype") is None:
        result = _short_sum(lazy, name)
    if result is None:
        dtype = {"dtype": kwargs["dtype"]} if kwargs.get("dtype") is not None else {}
        result = lazy.over_rows(lambda z: getattr(torch, name)(z, dim=-1, **dtype))
    lazy.evaluated(result)
    result = with_strides_of(on_meta(lazy, func, (lazy, *args), kwargs), result)
    if name in ("amax", "amin"):
        state = autocast_state(lazy.device.type)
        best = Recorded(getattr(torch, name), (lazy.expression, -1, True), {}, state)
        _remember(lazy, result, best)
    return result


def _remember(
    lazy: LazyLogits, values: Tensor, expression: Expression, indices: Tensor | None = None
) -> None:
    """Remembers numbers of each row, of K `indices` or one, for `picked_again`."""
    if values.dim() < lazy.shadow.dim():
        values = values.detach().unsqueeze(-1)
        indices = None if indices is None else indices.unsqueeze(-1)
    lazy.recorded.selections.append(Selection.of(values, expression, indices))


def _short_sum(lazy: LazyLogits, name: str) -> Tensor | None:
    """`sum` or `mean` over the vocabulary of a scaled linear layer, which needs no logits."""
    source, found = lazy.checked(), _of_one_head(lazy, lazy.expression)
    if found is None or found.softcap is not None or not source.head.is_whole:
        return None
    scale = found.scale / (lazy.shadow.shape[-1] if name == "mean" else 1)
    nothing = source.no_rows(lazy.expression)
    return summed(source.head, scale).to(getattr(torch, name)(nothing, dim=-1).dtype)


def total(lazy: LazyLogits, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """`sum` or `mean` of everything, whose gradients are made at once."""
    given = {} if dtype is None else {"dtype": dtype}
    of_torch = getattr(torch, name)(lazy.recorded.no_rows(lazy.expression), **given).dtype
    wide = torch.promote_types(of_torch, torch.float32) if of_torch.is_floating_point else of_torch
    rows = _short_sum(lazy, "sum") if of_torch == wide else None
    if rows is None:
        result = lazy.over_rows(lambda z: z.sum(dtype=wide), summed=True)
    else:
        result = rows.sum(dtype=wide)
    lazy.evaluated(result)
    return (result / lazy.shadow.numel() if name == "mean" else result).to(of_torch)


def _two(lazy: LazyLogits, both: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
    """Two results of each row, which one pass gives, without a history."""
    seconds: list[Tensor] = []

    def first(z: Tensor) -> Tensor:
        result, second = both(z)
        seconds.append(second)
        return result

    with torch.no_grad():
        return lazy.over_rows(first), torch.cat(seconds)


def _kept(lazy: LazyLogits, name: str) -> Tensor:
    """`logsumexp` or `argmax` of each row, of a pass that is not made again for logits that share
    `kept`."""
    kept, state = lazy._recipe.kept, autocast_state(lazy.device.type)  # the dtype of logsumexp
    if state not in kept:
        kept[state] = _two(lazy, lambda z: (z.logsumexp(-1), z.argmax(-1)))
    lse, argmax = kept[state]
    if name == "argmax":
        return argmax.clone()
    return lazy.over_rows(lambda z: z.logsumexp(-1), known=lse)


def top(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`topk`, and `max` or `min` over the vocabulary: values and indices."""
    name, several = func.__name__, func.__name__ == "topk"
    names = ("k", "dim", "largest", "sorted") if several else ("dim", "keepdim")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    dim = options.get("dim", -1 if several else None)
    if not options.keys() <= set(names) or not is_last(lazy, dim):
        return NotImplemented
    shadows = on_meta(lazy, func, (lazy, *args), kwargs)
    options |= {"dim": -1} if several else {"dim": -1, "keepdim": True}
    values, indices = _two(lazy, lambda z: getattr(torch, name)(z, **options))
    if lazy.requires_grad and torch.is_grad_enabled():
        values = _gathered(lazy, indices, known=values)
    lazy.evaluated(values)
    results = [with_strides_of(*pair) for pair in zip(shadows, (values, indices), strict=True)]
    _remember(lazy, results[0], lazy.expression, results[1].clone())
    return getattr(torch.return_types, name)(tuple(results))


def gather(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`gather` and `take_along_dim` along the vocabulary."""
    names = ("dim", "index") if func.__name__ == "gather" else ("indices", "dim")
    options: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    index: Any = options.get("index", options.get("indices"))
    is_alike = index.dim() == lazy.shadow.dim() and index.shape[:-1] == lazy.shadow.shape[:-1]
    if not is_last(lazy, options.get("dim")) or not is_alike or isinstance(index, type(lazy)):
        return NotImplemented
    shadow = on_meta(lazy, func, (lazy, *args), kwargs)
    rows = index.reshape(lazy.shadow.shape[:-1].numel(), index.shape[-1])
    result = _gathered(lazy, rows.long())
    lazy.evaluated(result)
    result = with_strides_of(shadow, result)
    _remember(lazy, result, lazy.expression, index.long().clone())
    return result


def _gathered(lazy: LazyLogits, rows: Tensor, known: Tensor | None = None) -> Tensor:
    """The numbers at `rows` (T, K), which may be `known` without their history."""
    result = picked(lazy.checked(), lazy.expression, rows)
    if result is not None:
        return result
    return lazy.over_rows(lambda z, i: z.gather(-1, i), rows, known=known)


_NAMES = "target weight size_average ignore_index reduce reduction label_smoothing".split()


def cross_entropy(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`F.cross_entropy` and `F.nll_loss`."""
    return _loss(lazy, func, **dict(zip(_NAMES, args, strict=False)), **kwargs)


def _loss(
    lazy: LazyLogits,
    func: Callable[..., Any],
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    is_old = size_average is not None or reduce is not None
    if is_old or (weight is not None and weight.requires_grad):
        return NotImplemented
    # as it is now, whatever becomes of it before backward
    options: dict[str, Any] = {"weight": None if weight is None else weight.clone()}
    if func is F.cross_entropy:
        options["label_smoothing"] = label_smoothing
        if isinstance(target, type(lazy)):
            return _of_lazy_probabilities(lazy, target, reduction=reduction, **options)
        if target.is_floating_point():
            return _of_probabilities(lazy, target, reduction=reduction, **options)
    is_plain = target.shape == lazy.shadow.shape[:1] and target.dtype in _INTEGERS
    if lazy.shadow.dim() != 2 or not is_plain or reduction not in ("none", "sum", "mean"):
        return NotImplemented
    options["ignore_index"] = ignore_index
    result = _of_classes(lazy, func, target, reduction, options)
    if lazy.is_evaluated and reduction == "mean":
        # Trainer leaves a batch without labels, whose mean is NaN, out of the mean over batches
        return result.where((target != ignore_index).any(), math.nan)
    return result


def _of_classes(
    lazy: LazyLogits,
    func: Callable[..., Any],
    target: Tensor,
    reduction: str,
    options: dict[str, Any],
) -> Tensor:
    """The loss of class indices, by the row kernel where it knows the expression."""
    ignore_index, weight = options["ignore_index"], options["weight"]
    target, bound = bound_of(target, ignore_index)
    # where labels are counted anyway, and numpy writes to them unseen
    if target.device.type == "cpu":
        bound = None
    known = known_rows(lazy, func) if target.dtype in (torch.int64, torch.int32) else None
    if known is not None:
        options |= {"reduction": reduction, "max_counted": bound}
        return _known_loss(lazy, func, target, **options, **known)
    kind = "none" if reduction == "none" else "sum"
    result = lazy.over_rows(
        lambda z, t: func(z, t, reduction=kind, **options),
        target,
        summed=kind == "sum",
        rows=CountedRows.of(target, ignore_index, -1 if bound is None else bound),
    )
    if reduction == "mean":
        counts = target != ignore_index
        ones = counts if weight is None else weight[target.where(counts, 0).long()] * counts
        result = result / torch.where(counts.any(), ones.sum(), 1)
    elif reduction == "sum":
        result = sum_of_counted(result, target != ignore_index)
    lazy.evaluated(result)
    return result


def _of_lazy_probabilities(
    lazy: LazyLogits,
    target: LazyLogits,
    reduction: str,
    weight: Tensor | None,
    label_smoothing: float,
) -> Any:
    """The cross-entropy of a student and its teacher's probabilities."""
    is_plain = weight is None and not label_smoothing and reduction in ("none", "sum", "mean")
    is_alike = target.shape == lazy.shape and lazy.shadow.dim() == 2
    if not is_plain or not is_alike or not target.is_lazy:
        return NotImplemented
    terms: Any = F.log_softmax(lazy, -1) * target
    if reduction == "none":
        return -terms.sum(-1)
    return -terms.sum() / (lazy.shadow.shape[0] if reduction == "mean" else 1)


def _of_probabilities(lazy: LazyLogits, target: Tensor, **options: Any) -> Any:
    known = known_rows(lazy)
    is_alike = target.shape == lazy.shape and lazy.shadow.dim() == 2
    is_spread = lazy.recorded.head.origin.shard is not None
    if known is None or not is_alike or is_spread or target.requires_grad:
        return NotImplemented
    return _known_loss(lazy, F.cross_entropy, target, **options, **known)


def _known_loss(
    lazy: LazyLogits, func: Callable[..., Any], target: Tensor, **options: Any
) -> Tensor:
    """The loss that the row kernel computes, in the dtype of torch's."""
    no_logits, weight = lazy.recorded.no_rows(lazy.expression), options["weight"]
    dtype = func(no_logits, target[:0], weight=weight, reduction="none").dtype
    head = lazy.checked().head
    result = head.inside_head(lambda layer: _fused(layer, target, **options)).to(dtype)
    lazy.evaluated(result)
    return result


def known_rows(
    lazy: LazyLogits, func: Callable[..., Any] = F.cross_entropy
) -> dict[str, Any] | None:
    """The options by which the row kernel computes a loss of these logits of one layer; None if it
    cannot."""
    expression, casts = lazy.expression, set()
    if func is F.nll_loss:
        if not (isinstance(expression, Recorded) and expression.function is torch.log_softmax):
            return None
        expression, casts = expression.arguments[0], set(expression.keywords.values())
    found = _of_one_head(lazy, expression, casts)
    if found is None or len(lazy.recorded.head.terms) > 1:
        return None
    return {"logit_scale": found.scale, "softcap": found.softcap}


def _of_one_head(
    lazy: LazyLogits, expression: Expression, casts: Iterable[torch.dtype] = ()
) -> ScaleAndSoftcap | None:
    """What an expression of one head's logits comes to, if all `casts` are to the dtype in which
    losses are computed anyway."""
    found = scale_and_softcap(expression) if lazy.recorded.is_single else None
    wide = torch.promote_types(lazy.recorded.head.dtype, torch.float32)
    return found if found is not None and found.casts.union(casts) <= {wide} else None


def _fused(layer: Linear, target: Tensor, **options: Any) -> Tensor:
    ((x, weight, bias),) = layer.terms
    options |= {"linear_bias": bias, "group": layer.origin.shard}
    with torch.autocast(x.device.type, enabled=False):  # it had its say when the head ran
        return linear_cross_entropy(x, weight, target, **options)
