"""What each torch function does to lazy logits: the rules by which they stay lazy.

* A view or a selection of rows is taken of the hidden states instead (`views`).
* A function that works on each row alone is recorded as an expression (here), also of the logits of
  several heads, and of tensors that somebody holds.
* A loss, or a reduction over the vocabulary, is evaluated a chunk of rows at a time
  (`losses`).

A rule gets the lazy logits, the function and its other arguments; one of `ANYWHERE`, whose lazy
logits may be any argument, gets all of them. It returns `NotImplemented` for whatever it is not
sure of: the logits are then materialised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.loss.lazy.combined import (
    broadcast,
    cat,
    logits_among,
    operands_of,
    stack,
    together,
)
from fastft.loss.lazy.evaluation import new_zeros, write
from fastft.loss.lazy.expressions import LOGITS, Recorded, autocast_state, scale_and_softcap
from fastft.loss.lazy.losses import (
    cross_entropy,
    gather,
    is_last,
    reduce,
    top,
    total,
)
from fastft.loss.lazy.views import (
    along_rows,
    clone,
    detach,
    getitem,
    iterate,
    on_meta,
    permute,
    reshape,
    shaped_as,
    shaped_as_other,
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


def pointwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of each element of lazy logits, of the same elements of others, and of tensors."""
    logits = logits_among(args, kwargs)
    if func in (torch.where, T.where) and len(args) + len(kwargs) < 3:
        return NotImplemented  # the positions of what is not 0
    if not logits or (func is F.logsigmoid and not logits[0].is_contiguous()):
        return NotImplemented  # the meta device lays it like its input, a CPU does not
    summed = _sum_of_two(logits[0], func, args[1:], kwargs) if args[0] is logits[0] else None
    if isinstance(summed, Tensor):
        return summed
    shadow = on_meta(logits[0], func, args, kwargs)
    if shadow.shape != logits[0].shape:
        return NotImplemented
    operands = operands_of(logits, args, kwargs, compares=shadow.dtype == torch.bool)
    if operands is None:
        return NotImplemented
    source, arguments, keywords = operands
    call = Recorded(func, arguments, keywords, autocast_state(source.device.type))
    return together(logits, call, shadow, source)


def _elementwise_loss(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`kl_div`, `mse_loss`, ... of two, of which one or both are lazy."""
    options = {name: value for name, value in kwargs.items() if value is not None}
    reduction = options.pop("reduction", "mean")
    if len(args) != 2 or options.keys() & {"size_average", "reduce", "weight"}:
        return NotImplemented
    each = pointwise(func, args, {**options, "reduction": "none"})
    if each is NotImplemented or reduction == "none":
        return each
    if reduction == "batchmean":
        return total(each, "sum") / each.shape[0]
    return total(each, reduction)


def _sum_of_two(
    lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A head plus a trained bias (ESM), or plus a LoRA head: still one linear layer."""
    is_sum = func.__name__ in ("add", "__add__", "__radd__") and len(args) == 1 and not kwargs
    is_layer = lazy.expression == LOGITS and lazy.recorded.is_single
    # a head that must be entered again, or that processes share, knows of its own term alone
    if not is_sum or not is_layer or not lazy.recorded.head.is_whole:
        return NotImplemented
    other, dtype, source = args[0], lazy.shadow.dtype, lazy.source
    if isinstance(other, type(lazy)):
        found = scale_and_softcap(other.expression) if other.is_lazy else None
        is_scaled = found is not None and found.softcap is None and not found.casts
        if found is None or not is_scaled or other.shape != lazy.shape:
            return NotImplemented
        head = other.source.head
        if not other.recorded.is_single or not head.is_whole or head.shares_with(source.head):
            return NotImplemented
        shadow = on_meta(lazy, func, (lazy, other), {})
        plus = source.with_head(source.head.plus(head, found.scale))
        return lazy.derived(LOGITS, shadow, plus)
    if not isinstance(other, Tensor) or not other.requires_grad:
        return NotImplemented
    is_wider = other.dtype == torch.float32 and lazy.recorded.head.terms[0][0].element_size() == 2
    is_bias = (
        other.numel() == lazy.shadow.shape[-1] == other.shape[-1]
        and other.dim() <= lazy.shadow.dim()
        and (other.dtype == dtype or is_wider)
    )
    if not is_bias:
        return NotImplemented
    shadow = on_meta(lazy, func, (lazy, other), {})
    plus = source.with_head(source.head.plus_bias(other.reshape(-1).to(dtype)))
    # where autocast ran the head in 16 bits, the sum with a bias of 32 has 32
    return lazy.derived(LOGITS, shadow, plus).to(other.dtype)


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
    call = Recorded(func, operands, kwargs or {}, autocast_state(lazy.recorded.device.type))
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
    _softmax: _named("log_softmax", "softmax"),
    reduce: _named(
        *("logsumexp", "sum", "mean", "argmax", "argmin", "amax", "amin", "all", "any"),
    ),
    top: _named("max", "min", "topk"),
    gather: _named("gather", "take_along_dim"),
    new_zeros: [T.new_zeros],
    shaped_as: _named("zeros_like", "ones_like", "full_like", "empty_like"),
    write: [T.__setitem__],
    cross_entropy: [F.cross_entropy, F.nll_loss],
}
RULES: dict[Callable[..., Any], Rule] = {
    function: rule for rule, functions in _FUNCTIONS.items() for function in functions
}
_ANYWHERE: dict[Callable[..., Any], list[Callable[..., Any]]] = {
    pointwise: _named(
        *("mul", "div", "add", "sub", "true_divide", "multiply", "divide", "subtract", "neg"),
        *("pow", "square", "sqrt", "abs", "exp", "expm1", "log", "log1p", "log2"),
        *("clamp", "clamp_min", "clamp_max", "maximum", "minimum", "logaddexp", "xlogy", "lerp"),
        *("tanh", "sigmoid", "logsigmoid", "softplus", "relu", "nan_to_num"),
        *("where", "masked_fill", "isnan", "isinf", "isfinite"),
        *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"),
        *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
        *("__and__", "__rand__", "__or__", "__ror__", "__invert__"),
        *("__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__rdiv__", "__neg__"),
        *("__add__", "__radd__", "__sub__", "__rsub__", "__pow__", "__rpow__"),
    ),
    _elementwise_loss: [F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss],
    stack: [torch.stack],
    cat: [torch.cat, torch.concat, torch.concatenate],
    broadcast: [torch.broadcast_tensors],
}
ANYWHERE: dict[Callable[..., Any], Callable[..., Any]] = {
    function: rule for rule, functions in _ANYWHERE.items() for function in functions
}
# of a tensor that somebody has, whose other argument is lazy
OTHERS: dict[Callable[..., Any], Callable[..., Any]] = {
    function: shaped_as_other
    for function in _named("expand_as", "view_as", "reshape_as", "to", "type_as")
}
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    **{T.mul_: T.mul, T.div_: T.div, T.add_: T.add, T.sub_: T.sub},
    **{T.__imul__: T.mul, T.__itruediv__: T.div, T.__iadd__: T.add, T.__isub__: T.sub},
    **{T.neg_: T.neg, T.exp_: T.exp, T.tanh_: T.tanh, T.clamp_: T.clamp},
    T.masked_fill_: T.masked_fill,
}
