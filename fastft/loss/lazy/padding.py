"""Lazy logits padded to a longer shape: processes of an evaluation make theirs equally long.

    padded = logits.new_zeros(shape) + value          accelerate's `pad_across_processes`
    padded[:, :length] = logits

A tensor of one value is the logits of a layer without hidden states (H = 0): it costs nothing.
Logits written into it make it their own layer over padded hidden states, with a mark at each row
that keeps the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    zeros, (x, weight, _) = func(lazy.shadow, *args, **kwargs), lazy.linear.terms[0]
    is_alike = zeros.dim() == lazy.shadow.dim() and zeros.shape[-1] == lazy.linear.origin.vocab
    if not is_alike or kwargs or not lazy.is_evaluated:
        return func(x.new_empty(0, dtype=lazy.shadow.dtype), *args, **kwargs)
    nothing = x.new_empty(*zeros.shape[:-1], 0), weight.new_empty(zeros.shape[-1], 0), None
    origin = lazy.linear.origin._replace(head=None, check=None)
    expression = Recorded(Tensor.to, (LOGITS, lazy.shadow.dtype), {}, autocast_state(x.device.type))
    return lazy._make(Linear.of(nothing, origin=origin), expression, zeros, lazy._recipe.report)


def write(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`lazy[slices] = logits`, where `lazy` has one value everywhere and nobody else knows it."""
    index, logits = args
    fits = (
        # nobody else knows it
        (lazy._root is None and not lazy._has_views and lazy.linear.terms[0][0].shape[-1] == 0)
        and (isinstance(logits, type(lazy)) and logits.is_lazy and logits.linear.marked is None)
        and (isinstance(index, tuple) and len(index) == lazy.shadow.dim())
        and all(isinstance(item, slice) for item in index)
        and (lazy.shadow[index].shape, lazy.shadow.dtype) == (logits.shape, logits.shadow.dtype)
    )
    if not fits:
        return NotImplemented
    value = evaluate(lazy.expression, lazy.linear.terms[0][0].new_zeros(1))
    if value.numel() != 1:
        return NotImplemented

    def longer(x: Tensor) -> Tensor:
        result = x.new_zeros(*lazy.shadow.shape[:-1], x.shape[-1])
        result[index[:-1]] = x
        return result

    linear = logits.checked().with_inputs(longer)
    rows = torch.ones(*logits.shape[:-1], 1, dtype=torch.bool, device=value.device)
    lazy._recipe.linear = replace(linear, marked=~longer(rows))
    operands = MARKED, value.reshape(()), logits.expression
    state = autocast_state(value.device.type)
    lazy._recipe.expression = Recorded(torch.where, operands, {}, state)
    return None
