"""Labels of which the host knows how many count: the rows of the others cost a GPU nothing either.

    batch.to(device)   counts the labels while they are on the host, and notes the number with those
                       on the device
    model(labels=...)  a hook gives the model `CountedLabels`: the same tensor, which knows it
    the model's loss   shifts, pads, flattens it; what comes out knows the number too, as an upper
                       bound
    the fused loss     takes so many rows, the first that count, and nobody waits for the device

The bound is never a guess: a tensor loses it in every operation that could let more labels count
than before, and by being written to. Then the loss takes all rows, as it does of labels that nobody
counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastft.foreign.tensors import write_stamp

IGNORE_INDEX = -100
_INDICES = (torch.int64, torch.int32)
KnownCount = Callable[[Tensor], int | None]


def _stamp(labels: Tensor) -> tuple[int, int] | None:
    with torch._C.DisableTorchFunctionSubclass():
        return write_stamp(labels)


class CountedLabels(Tensor):
    """Labels, at most `counted` of which are not -100, as long as their stamp is `stamp`."""

    counted: int
    stamp: tuple[int, int]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        # as it is before `func`; a compiler traces this too, and would compile again for each bound
        counted = None
        if isinstance(source, cls) and not torch.compiler.is_compiling():
            counted = _known(source)
        result = func(*map(_plain, args), **{key: _plain(value) for key, value in kwargs.items()})
        if counted is None or not _keeps_the_bound(func, args, kwargs, args[0], result):
            return result
        if isinstance(result, Tensor):
            return _counted(result, counted)
        return type(result)(_counted(part, counted) for part in result)


def _plain(value: Any) -> Any:
    if isinstance(value, CountedLabels):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _counted(labels: Tensor, counted: int) -> Tensor:
    stamp = _stamp(labels)
    if stamp is None:
        return labels
    with torch._C.DisableTorchFunctionSubclass():
        result = labels.as_subclass(CountedLabels)
    result.counted, result.stamp = counted, stamp
    return result


def _known(labels: CountedLabels) -> int | None:
    """How many labels count at most; None once somebody has written to them."""
    return labels.counted if labels.stamp == _stamp(labels) else None


def _named(names: str) -> set[Any]:
    return {
        getattr(place, name)
        for name in names.split()
        for place in (torch, Tensor)
        if hasattr(place, name)
    }


# what picks or moves elements and has none twice
_PICKS = _named(
    "view reshape flatten unflatten contiguous clone detach unsqueeze squeeze narrow select t "
    "transpose movedim permute chunk split tensor_split unbind roll flip"
)
_CASTS = _named("to long int cuda cpu")
_PADS = {F.pad, torch.constant_pad_nd}


def _keeps_the_bound(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor, result: Any
) -> bool:
    """Whether no more labels of `result` count than of `source`."""
    with torch._C.DisableTorchFunctionSubclass():
        dtype, size = source.dtype, source.numel()
    if func in _PICKS:  # a view of another dtype is other numbers
        return all(part.dtype == dtype for part in _tensors(result))
    if func in _CASTS:
        return all(part.dtype in _INDICES for part in _tensors(result))
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(type(part) in (int, slice, type(None), type(...)) for part in index)
    if func in _PADS:
        given: tuple[Any, ...] = args[2:] if func is F.pad else ("constant", *args[2:])
        defaults: tuple[Any, ...] = ("constant", None)
        mode, value = (*given, *defaults[len(given) :])
        return kwargs.get("mode", mode) == "constant" and kwargs.get("value", value) == IGNORE_INDEX
    if func in (Tensor.masked_fill, torch.masked_fill):
        filled = kwargs.get("value", args[2] if len(args) > 2 else None)
        # not made larger by the mask
        return type(filled) is int and filled == IGNORE_INDEX and result.numel() == size
    return False


def _tensors(result: Any) -> Iterator[Tensor]:
    yield from (result,) if isinstance(result, Tensor) else result


def bound_of(target: Tensor, ignore_index: int) -> tuple[Tensor, int | None]:
    """Returns `target` as a plain tensor, and how many count at most; None: nobody knows."""
    if not isinstance(target, CountedLabels):
        return target, None
    known = ignore_index == IGNORE_INDEX and not torch.compiler.is_compiling()
    plain: Tensor = _plain(target)
    return plain, _known(target) if known else None


def _give_counted(
    known_count: KnownCount, model: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    labels = kwargs.get("labels")
    if torch.compiler.is_compiling() or type(labels) is not Tensor:
        return None
    counted = known_count(labels)
    return None if counted is None else (args, {**kwargs, "labels": _counted(labels, counted)})


def give_counted_labels(model: nn.Module, known_count: KnownCount) -> Callable[[], None]:
    """Gives `model` labels as `CountedLabels`, until the result is called.

    Args:
        model: what is called with `labels=`.
        known_count: what the host knows of labels: how many count at most, or None.
    """
    hook = functools.partial(_give_counted, known_count)
    return model.register_forward_pre_hook(hook, with_kwargs=True).remove
