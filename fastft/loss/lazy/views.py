"""Views of lazy logits and selections of their rows: taken of the hidden states instead.

Each rule also applies the function to `lazy.shadow`, a tensor on the meta device, which gives shape
and strides, tells a view from a copy (by its memory), and raises what torch would raise. A rule
that is not sure returns `NotImplemented`: the logits are then materialised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from fastft.loss.lazy.logits import LazyLogits

_MASKS = (torch.bool, torch.uint8)


def is_logits(value: Any) -> TypeGuard[LazyLogits]:
    """Whether it is of the class that is built on these rules, which cannot import it."""
    return hasattr(type(value), "is_lazy")


def on_meta(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `func` makes of the shadows of its tensors: the shape and strides of its result."""

    def shadow(value: Any) -> Any:
        if isinstance(value, type(lazy)):
            return value.shadow
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    args, kwargs = tree_map(shadow, (args, kwargs))
    return func(*args, **kwargs)


def _without_numbers(lazy: LazyLogits) -> Tensor:
    """A tensor of the shape, dtype and device of lazy logits, of one number."""
    return torch.empty((), dtype=lazy.shadow.dtype, device=lazy.device).expand(lazy.shadow.shape)


def shaped_as(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`zeros_like(logits)` and its kind, which read no logits."""
    device = kwargs.get("device")
    if device is not None and torch.empty(0, device=device).device != lazy.device:
        return NotImplemented
    options = {name: value for name, value in kwargs.items() if name != "device"}
    shadow = func(lazy.shadow, *args, **options)
    result = func(_without_numbers(lazy), *args, **options)
    if result.stride() != shadow.stride():
        return NotImplemented
    return result


def shaped_as_other(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`mask.expand_as(logits)`, `values.to(logits)`, ..., which read none either."""

    def without(value: Any) -> Any:
        return _without_numbers(value) if is_logits(value) else value

    args, kwargs = tree_map(without, (args, kwargs))
    return func(*args, **kwargs)


def with_strides_of(shadow: Tensor, result: Tensor) -> Tensor:
    """`result`, whose rows may be flat, in memory as torch lays it: `view` depends on that."""
    result = result.reshape(shadow.shape)
    if result.stride() == shadow.stride():
        return result
    return result.new_empty_strided(shadow.shape, shadow.stride()).copy_(result)


def reshape(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`view`, `reshape`: the vocabulary stays the last dimension."""
    if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        return NotImplemented
    shadow = func(lazy.shadow, *args, **kwargs)
    if shadow.dim() == 0 or shadow.shape[-1] != lazy.shadow.shape[-1] or shadow.numel() == 0:
        return NotImplemented

    def change(x: Tensor) -> Tensor:
        return x.reshape(*shadow.shape[:-1], x.shape[-1])

    return lazy.viewed(func, args, kwargs, shadow, change, same_rows=True)


# what a function calls the dimension that it works on, where that stands behind the tensor, and its
# default; of others "dim" stands first, and has none
_DIMENSIONS = {
    "split": ("dim", 1, 0),
    "chunk": ("dim", 1, 0),
    "unbind": ("dim", 0, 0),
    "flatten": ("end_dim", 1, -1),
}


def _dimensions(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The dimensions that the function `name` with `args` (without the tensor) works on."""
    if name in ("transpose", "swapaxes", "swapdims"):
        return [*args[:2], *(kwargs[key] for key in kwargs if key.startswith(("dim", "axis")))]
    keyword, place, default = _DIMENSIONS.get(name, ("dim", 0, None))
    return [kwargs.get(keyword, args[place] if len(args) > place else default)]


def along_rows(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Applies a function of named dimensions, none of them the vocabulary, to the hidden states."""
    size = lazy.shadow.dim() + (func.__name__ == "unsqueeze")
    dimensions = _dimensions(func.__name__, args, kwargs)
    if not all(isinstance(d, int) and (d + 1) % size for d in dimensions):
        return NotImplemented
    shadow = on_meta(lazy, func, (lazy, *args), kwargs)
    if isinstance(shadow, tuple | list):
        return tuple(_part(lazy, func, args, kwargs, *numbered) for numbered in enumerate(shadow))
    return lazy.viewed(func, args, kwargs, shadow, lambda x: func(x, *args, **kwargs))


def _part(
    lazy: LazyLogits,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    index: int,
    shadow: Tensor,
) -> LazyLogits:
    def take(tensor: Tensor) -> Tensor:
        return func(tensor, *args, **kwargs)[index]

    return lazy.viewed(take, (), {}, shadow, take)


def permute(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`permute`, the vocabulary last."""
    dims = kwargs.get("dims", args[0] if args and isinstance(args[0], tuple | list) else args)
    if not dims or dims[-1] not in (-1, lazy.shadow.dim() - 1):
        return NotImplemented
    return lazy.viewed(
        func, args, kwargs, func(lazy.shadow, *args, **kwargs), lambda x: func(x, *args, **kwargs)
    )


def iterate(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`for row in logits`."""
    parts = along_rows(lazy, Tensor.unbind, (0,), {})
    return parts if parts is NotImplemented else iter(parts)


def getitem(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`logits[index]`, where the index says nothing about the vocabulary."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    if not all(item is None or _is_plain(item) for item in index):
        return NotImplemented
    shadow = lazy.shadow[tuple(part for item in index for part in _on_meta(item))]
    if _indexed_dimensions(index, lazy.shadow.dim()):
        classes = range(lazy.shadow.shape[-1])
        if not isinstance(index[-1], slice) or classes[index[-1]] != classes:
            return NotImplemented
        index = (*index[:-1], slice(None))
    return lazy.viewed(func, args, kwargs, shadow, lambda x: x[index])


def _is_plain(item: Any) -> bool:
    """Whether an index is an integer, a slice, an ellipsis or an ordinary tensor."""
    if isinstance(item, Tensor):
        return item.dim() > 0 or item.dtype not in _MASKS
    return type(item) is not bool and (isinstance(item, int | slice) or item is Ellipsis)


def _on_meta(item: Any) -> tuple[Any, ...]:
    """An index for the meta device, where a mask is the positions of its true elements."""
    if not isinstance(item, Tensor):
        return (item,)
    parts = item.nonzero(as_tuple=True) if item.dtype in _MASKS else (item,)
    return tuple(part.to("meta") for part in parts)


def _indexed_dimensions(index: tuple[Any, ...], dimensions: int) -> bool:
    """Whether the index says anything about the last dimension."""
    for position, item in enumerate(index):
        if item is Ellipsis:
            return any(after is not None for after in index[position + 1 :])
    used = [
        item.dim() if isinstance(item, Tensor) and item.dtype in _MASKS else 1
        for item in index
        if item is not None
    ]
    return sum(used) >= dimensions


def clone(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`clone`, `contiguous`."""
    shadow = func(lazy.shadow, *args, **kwargs)
    if shadow is lazy.shadow:
        return lazy
    return lazy.viewed(func, args, kwargs, shadow, lambda x: x, same_rows=True)


def detach(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`detach`: who calls it while gradients are recorded may keep the numbers.

    So it is lazy where the weight is not trained, or somebody settles what is kept before it
    changes. Inside a Function it is plumbing.
    """
    heads = lazy.recorded.heads
    may_change = any(
        head.origin.held is None and any(w.requires_grad for _, w, _ in head.terms)
        for head in heads
    )
    if torch.is_grad_enabled() and may_change and not lazy.is_evaluated:
        return NotImplemented
    with torch.no_grad():
        return lazy.viewed(func, args, kwargs, lazy.shadow.detach(), lambda x: x, same_rows=True)
