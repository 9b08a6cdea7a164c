"""Lazy logits padded to a longer shape: how the processes of an evaluation make theirs equally
long.

    padded = logits.new_zeros(shape) + value;  padded[:, :length] = logits      accelerate's `pad_across_processes`

A tensor of one value is the logits of a layer without hidden states (H = 0): it costs nothing.
Logits written into it make it their own layer over padded hidden states, with a mark at each row
that keeps the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastft.loss.lazy.expressions import LOGITS, MARKED, Linear, Recorded, autocast_state, evaluate

if TYPE_CHECKING:
    from fastft.loss.lazy.logits import LazyLogits


def new_zeros(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`new_zeros`: lazy in an evaluation where the shape is one of logits, else real zeros."""
    zeros = func(lazy.shadow, *args, **kwargs)
    if (
        zeros.dim() != lazy.shadow.dim()
        or zeros.shape[-1] != lazy.linear.vocab
        or kwargs
        or not lazy.is_evaluated
    ):
        return func(lazy.linear.terms[0][0].new_empty(0, dtype=lazy.shadow.dtype), *args, **kwargs)
    x, weight, _ = lazy.linear.terms[0]
    nothing = x.new_empty(*zeros.shape[:-1], 0), weight.new_empty(lazy.linear.vocab, 0), None
    origin = lazy.linear.origin._replace(head=None, check=None)
    expression = Recorded(Tensor.to, (LOGITS, lazy.shadow.dtype), {}, autocast_state(x.device.type))
    return lazy._make(Linear.of(nothing, origin=origin), expression, zeros, lazy._recipe.report)


def write(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`lazy[slices] = logits`, where `lazy` has one value everywhere and nobody else knows it."""
    index, logits = args
    if not isinstance(logits, type(lazy)) or not logits.is_lazy or logits.linear.marked is not None:
        return NotImplemented
    if not _is_blank(lazy) or not isinstance(index, tuple) or len(index) != lazy.shadow.dim():
        return NotImplemented
    if (
        not all(isinstance(item, slice) for item in index)
        or lazy.shadow[index].shape != logits.shape
    ):
        return NotImplemented
    value = evaluate(lazy.expression, lazy.linear.terms[0][0].new_zeros(1))
    if logits.shadow.dtype != lazy.shadow.dtype or value.numel() != 1:
        return NotImplemented
    source, rows, leading = logits.checked(), index[:-1], lazy.shadow.shape[:-1]
    terms = []
    for x, weight, bias in source.terms:
        longer = x.new_zeros(*leading, x.shape[-1])
        longer[rows] = x
        terms.append((longer, weight, bias))
    marked = torch.ones(*leading, 1, dtype=torch.bool, device=terms[0][0].device)
    marked[rows] = False
    state = autocast_state(value.device.type)
    where = Recorded(torch.where, (MARKED, value.reshape(()), logits.expression), {}, state)
    recipe = lazy._recipe
    recipe.linear, recipe.expression = Linear.of(*terms, origin=source.origin, marked=marked), where
    return None


def _is_blank(lazy: LazyLogits) -> bool:
    return lazy.linear.terms[0][0].shape[-1] == 0 and lazy._root is None and not lazy._has_views
