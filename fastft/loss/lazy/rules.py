"""What each torch function does to lazy logits: the rules by which they stay lazy.

* A view or a selection of rows is taken of the hidden states instead (`views`).
* A function that works on each row alone is recorded as an expression (here).
* A loss, or a reduction over the vocabulary, is evaluated a chunk of rows at a time
  (`losses`).

A rule gets the lazy logits, the function and its arguments, and returns `NotImplemented` for
whatever it is not sure of: the logits are then materialised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.loss.lazy.evaluation import new_zeros, write
from fastft.loss.lazy.expressions import LOGITS, Recorded, autocast_state, is_freed
from fastft.loss.lazy.losses import cross_entropy, gather, is_last, reduce, scale_and_softcap, top
from fastft.loss.lazy.views import (
    along_rows,
    clone,
    detach,
    getitem,
    iterate,
    on_meta,
    permute,
    reshape,
)

if TYPE_CHECKING:
    from fastft.loss.lazy.logits import LazyLogits

T = Tensor
Rule = Callable[["LazyLogits", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
CASTS = {
    T.float: torch.float32,
    T.half: torch.float16,
    T.bfloat16: torch.bfloat16,
    T.double: torch.float64,
}


def _cast(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    dtype, device = CASTS.get(func), None
    flags = [value for value in args if isinstance(value, bool)]  # non_blocking, copy
    copies = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.device | str):
            device = torch.device(value)
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, value.device
        elif not isinstance(value, bool) and value is not None:
            return NotImplemented
    if device is not None and torch.empty(0, device=device).device != lazy.device:
        return NotImplemented
    if dtype is None or dtype == lazy.shadow.dtype:
        if not copies:
            return lazy
        return lazy.viewed(func, (), {}, lazy.shadow.clone(), lambda x: x, same_rows=True)
    return _record(lazy, (lazy.expression, dtype), T.to, (lazy, dtype))


def _pointwise(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        return NotImplemented
    if func is F.logsigmoid and not lazy.is_contiguous():
        return NotImplemented  # the meta device lays it like its input, a CPU does not
    arguments: list[Any] = []
    for arg in (lazy, *args):
        operand = _operand(lazy, arg)
        if operand is None:
            return _sum_of_two(lazy, func, args, kwargs)
        arguments.append(operand[0])
    return _record(lazy, tuple(arguments), func, (lazy, *args), kwargs)


def _reflected(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`torch.mul(2, lazy)`: the first argument is no tensor of rows. `args` is (first, lazy)."""
    operand = _operand(lazy, args[0])
    if operand is None or kwargs:
        return NotImplemented
    return _record(lazy, (operand[0], lazy.expression), func, args)


def _operand(lazy: LazyLogits, arg: Any) -> tuple[Any] | None:
    """What stands for an argument in an expression; None if it differs by row, or is trained."""
    if isinstance(arg, type(lazy)):
        same = arg is lazy or (
            arg.is_lazy and arg.source.same_as(lazy.source) and arg.shape == lazy.shape
        )
        return (arg.expression,) if same else None
    if not isinstance(arg, Tensor):
        return (arg,)
    is_row = arg.numel() == 1 or arg.shape[-1] == lazy.shadow.shape[-1] == arg.numel()
    if arg.requires_grad or arg.dim() > lazy.shadow.dim() or not is_row:
        return None
    return (arg.reshape(-1 if arg.dim() else ()).clone(),)  # as it is now, whatever becomes of it


def _sum_of_two(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A head plus a trained bias (ESM), or plus a LoRA head: still one linear layer."""
    is_sum = func.__name__ in ("add", "__add__", "__radd__") and len(args) == 1 and not kwargs
    if not is_sum or lazy.expression is not LOGITS or not isinstance(args[0], Tensor):
        return NotImplemented
    summands = [part for part in (lazy, args[0]) if isinstance(part, type(lazy))]
    if any(part.linear.origin.shard is not None for part in summands):
        return NotImplemented  # this process has some classes of one, and maybe all of the other
    other, dtype = args[0], lazy.shadow.dtype
    if isinstance(other, type(lazy)):
        found = scale_and_softcap(other.expression) if other.is_lazy else None
        is_scaled = found is not None and found.softcap is None and not found.casts
        if found is None or not is_scaled or other.shape != lazy.shape or _any_freed(lazy, other):
            return NotImplemented
        shadow = on_meta(lazy, func, (lazy, other), {})
        return lazy.derived(LOGITS, shadow, lazy.source.plus(other.source, found.scale))
    is_wider = other.dtype == torch.float32 and lazy.linear.terms[0][0].element_size() == 2
    is_bias = (
        other.numel() == lazy.shadow.shape[-1] == other.shape[-1]
        and other.dim() <= lazy.shadow.dim()
        and (other.dtype == dtype or is_wider)
    )
    if not is_bias or _any_freed(lazy):
        return NotImplemented
    shadow = on_meta(lazy, func, (lazy, other), {})
    linear = lazy.source.plus_bias(other.reshape(-1).to(dtype))
    # where autocast ran the head in 16 bits, the sum with a bias of 32 has 32
    return lazy.derived(LOGITS, shadow, linear).to(other.dtype)


def _any_freed(*logits: LazyLogits) -> bool:
    """Whether a head must be entered again, which knows of its own term alone."""
    return any(is_freed(weight) for lazy in logits for _, weight, _ in lazy.linear.terms)


def _softmax(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not is_last(lazy, kwargs.get("dim", args[0] if args else None)):
        return NotImplemented
    dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
    function = torch.log_softmax if "log" in func.__name__ else torch.softmax
    return _record(
        lazy, (lazy.expression, -1), function, (lazy, -1), {"dtype": dtypes[0]} if dtypes else {}
    )


def _record(
    lazy: LazyLogits,
    operands: tuple[Any, ...],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> LazyLogits:
    """`func(*args, **kwargs)`, whose arguments are `operands` in an expression over rows."""
    call = Recorded(
        func, operands, kwargs or {}, autocast_state(lazy.linear.terms[0][0].device.type)
    )
    return lazy.derived(call, on_meta(lazy, func, args, call.keywords))


def _named(*names: str) -> list[Callable[..., Any]]:
    """The method, the function and the functional of each name, where there is one."""
    return [
        getattr(space, name)
        for name in names
        for space in (T, torch, F)
        if callable(getattr(space, name, None))
    ]


_FUNCTIONS: dict[Rule, list[Callable[..., Any]]] = {
    reshape: _named("view", "reshape", "view_as", "reshape_as"),
    along_rows: _named(
        *("flatten", "unsqueeze", "squeeze", "transpose", "swapaxes", "swapdims"),
        *("split", "chunk", "unbind", "select", "narrow", "index_select"),
    ),
    permute: _named("permute"),
    iterate: [T.__iter__],
    getitem: [T.__getitem__],
    clone: _named("clone", "contiguous"),
    detach: _named("detach"),
    _cast: [*CASTS, T.to, T.type_as],
    _pointwise: _named(
        *("mul", "div", "add", "sub", "true_divide", "multiply", "divide", "neg", "pow", "square"),
        *("clamp", "clamp_min"),
        *("tanh", "exp", "log", "sigmoid", "logsigmoid", "relu", "nan_to_num"),
        *("__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__neg__", "__pow__"),
        *("__add__", "__radd__", "__sub__", "__rsub__"),
    ),
    _softmax: _named("log_softmax", "softmax"),
    reduce: _named("logsumexp", "sum", "mean", "argmax", "amax"),
    top: [T.max, torch.max, T.topk, torch.topk],
    gather: _named("gather"),
    new_zeros: [T.new_zeros],
    write: [T.__setitem__],
    cross_entropy: [F.cross_entropy, F.nll_loss],
}
RULES: dict[Callable[..., Any], Rule] = {
    function: rule for rule, functions in _FUNCTIONS.items() for function in functions
}
REFLECTED: dict[Callable[..., Any], Rule] = dict.fromkeys(
    _named("mul", "div", "add", "sub"), _reflected
)
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    **{T.mul_: T.mul, T.div_: T.div, T.add_: T.add, T.sub_: T.sub},
    **{T.__imul__: T.mul, T.__itruediv__: T.div, T.__iadd__: T.add, T.__isub__: T.sub},
    **{T.neg_: T.neg, T.exp_: T.exp, T.tanh_: T.tanh, T.clamp_: T.clamp},
}
