"""What each torch function does to lazy logits: the rules by which they stay lazy.

* A view or a selection of rows is taken of the hidden states instead.
* A function that works on each row alone is recorded as an expression.
* A loss, or a reduction over the vocabulary, is evaluated a chunk of rows at a time.

A rule gets the lazy logits, the function and its arguments, and returns `NotImplemented` for whatever it is not sure
of: the logits are then materialised. Every rule for a view also applies the function to `lazy.shadow`, a tensor on the
meta device, which gives shape and strides, tells a view from a copy, and raises what torch would raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.loss.expressions import LOGITS, Call, Expression, Linear, autocast_state, is_freed, map_rows, sum_over_rows
from fastft.loss.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from fastft.loss.lazy_logits import LazyLogits

T = Tensor
Rule = Callable[["LazyLogits", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CASTS = {T.float: torch.float32, T.half: torch.float16, T.bfloat16: torch.bfloat16, T.double: torch.float64}


# --- views and selections of rows


def _reshape(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        return NotImplemented
    shadow = func(lazy.shadow, *args, **kwargs)
    if shadow.dim() == 0 or shadow.shape[-1] != lazy.shadow.shape[-1] or shadow.numel() == 0:
        return NotImplemented
    return lazy.viewed(func, args, kwargs, shadow, lambda x: x.reshape(*shadow.shape[:-1], x.shape[-1]))


def _dimensions(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The dimensions that a function with arguments `args` (without the tensor) works on."""
    name = func.__name__
    if name in ("transpose", "swapaxes", "swapdims"):
        return [*args[:2], *(kwargs[key] for key in kwargs if key.startswith(("dim", "axis")))]
    if name in ("split", "chunk"):
        return [kwargs.get("dim", args[1] if len(args) > 1 else 0)]
    if name == "unbind":
        return [kwargs.get("dim", args[0] if args else 0)]
    if name == "flatten":
        return [kwargs.get("end_dim", args[1] if len(args) > 1 else -1)]
    if "dim" in kwargs or args:
        return [kwargs.get("dim", args[0] if args else None)]
    return None


def _along_rows(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of named dimensions, none of which is the vocabulary: the same of the hidden states."""
    last = lazy.shadow.dim() - 1
    size = last + 2 if func.__name__ == "unsqueeze" else last + 1
    dimensions = _dimensions(func, args, kwargs)
    if dimensions is None or not all(isinstance(dim, int) and dim % size != size - 1 for dim in dimensions):
        return NotImplemented
    if any(isinstance(arg, Tensor) for arg in (*args, *kwargs.values())):
        shadow = None
    else:
        shadow = func(lazy.shadow, *args, **kwargs)
    if isinstance(shadow, tuple | list):
        return tuple(_part(lazy, func, args, kwargs, index, part) for index, part in enumerate(shadow))
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


def _permute(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dims = kwargs.get("dims", args[0] if args and isinstance(args[0], tuple | list) else args)
    if not dims or dims[-1] not in (-1, lazy.shadow.dim() - 1):
        return NotImplemented
    return lazy.viewed(func, args, kwargs, func(lazy.shadow, *args, **kwargs), lambda x: func(x, *args, **kwargs))


def _iterate(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = _along_rows(lazy, T.unbind, (0,), {})
    return parts if parts is NotImplemented else iter(parts)


def _getitem(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    if any(isinstance(item, bool | list | range) or (item is not None and _is_mixed(item)) for item in index):
        return NotImplemented
    if _indexed_dimensions(index, lazy.shadow.dim()):
        if not (isinstance(index[-1], slice) and _takes_all(index[-1], lazy.shadow.shape[-1])):
            return NotImplemented
        index = (*index[:-1], slice(None))
    has_tensor = any(isinstance(item, Tensor) for item in index)
    shadow = None if has_tensor else lazy.shadow[args[0]]
    return lazy.viewed(func, args, kwargs, shadow, lambda x: x[index])


def _is_mixed(item: Any) -> bool:
    """An index whose meaning is not plain: neither an integer, a slice, an ellipsis nor an ordinary tensor."""
    return not (isinstance(item, int | slice | Tensor) or item is Ellipsis)


def _takes_all(item: slice, size: int) -> bool:
    return item.start in (None, 0) and item.step in (None, 1) and (item.stop is None or item.stop >= size)


def _indexed_dimensions(index: tuple[Any, ...], dimensions: int) -> bool:
    """Whether the index says anything about the last dimension."""
    for position, item in enumerate(index):
        if item is Ellipsis:
            return any(after is not None for after in index[position + 1 :])
    used = [
        item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1 for item in index if item is not None
    ]
    return sum(used) >= dimensions


def _clone(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shadow = func(lazy.shadow, *args, **kwargs)
    if shadow is lazy.shadow:
        return lazy
    return lazy.viewed(func, args, kwargs, shadow, lambda x: x)


def _detach(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Who detaches while gradients are recorded wants to keep the numbers; inside a Function it is plumbing."""
    return NotImplemented if torch.is_grad_enabled() else lazy.derived(lazy.expression)


# --- functions of each row alone


def _cast(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dtype, device = CASTS.get(func), None
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.device | str):
            device = torch.device(value)
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, value.device
        elif not isinstance(value, bool) and value is not None:
            return NotImplemented
    if device is not None and device.type != lazy.linear.terms[0][0].device.type:
        return NotImplemented
    if dtype is None or (dtype == lazy.shadow.dtype and not kwargs.get("copy")):
        return lazy if not kwargs.get("copy") else lazy.derived(lazy.expression)
    return _record(lazy, T.to, (lazy.expression, dtype), {})


def _pointwise(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        return NotImplemented
    arguments: list[Any] = []
    for arg in (lazy, *args):
        operand = _operand(lazy, arg)
        if operand is None:
            return _sum_of_two(lazy, func, args, kwargs)
        arguments.append(operand[0])
    return _record(lazy, func, tuple(arguments), kwargs)


def _reflected(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.mul(2, lazy)`: the first argument is no tensor of rows. `args` is (first, lazy)."""
    operand = _operand(lazy, args[0])
    if operand is None or kwargs:
        return NotImplemented
    return _record(lazy, func, (operand[0], lazy.expression), kwargs)


def _operand(lazy: LazyLogits, arg: Any) -> tuple[Any] | None:
    """What stands for an argument in an expression over rows; None if it differs from row to row or is trained."""
    if isinstance(arg, type(lazy)):
        same = arg is lazy or (arg.is_lazy and arg.source.same_as(lazy.source) and arg.shape == lazy.shape)
        return (arg.expression,) if same else None
    if not isinstance(arg, Tensor):
        return (arg,)
    if arg.requires_grad or arg.dim() > lazy.shadow.dim():
        return None
    if arg.numel() == 1:
        return (arg.reshape(()) if arg.dim() == 0 else arg.reshape(1),)
    return (arg.reshape(-1),) if arg.shape[-1] == lazy.shadow.shape[-1] == arg.numel() else None


def _sum_of_two(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A head plus a trained bias (ESM), or plus a LoRA head: still one linear layer."""
    if func.__name__ not in ("add", "__add__", "__radd__") or kwargs or len(args) != 1 or lazy.expression is not LOGITS:
        return NotImplemented
    other, dtype = args[0], lazy.shadow.dtype
    if isinstance(other, type(lazy)):
        scale = _scale_of(other.expression) if other.is_lazy else None
        if scale is None or other.shape != lazy.shape or other.dtype != dtype or _any_freed(lazy, other):
            return NotImplemented
        return lazy.derived(LOGITS, lazy.source.plus(other.source, scale))
    is_bias = isinstance(other, Tensor) and other.numel() == lazy.shadow.shape[-1] == other.shape[-1]
    if not is_bias or other.dtype != dtype or other.dim() > lazy.shadow.dim() or _any_freed(lazy):
        return NotImplemented
    return lazy.derived(LOGITS, lazy.source.plus_bias(other.reshape(-1)))


def _any_freed(*logits: LazyLogits) -> bool:
    """Whether a head must be entered again, which knows of its own term alone."""
    return any(is_freed(weight) for lazy in logits for _, weight, _ in lazy.linear.terms)


def _scale_of(expression: Expression) -> float | None:
    """c where the expression is c * logits."""
    if not isinstance(expression, Call):
        return 1.0
    if expression.function.__name__ not in ("mul", "__mul__", "__rmul__") or len(expression.arguments) != 2:
        return None
    factors = [argument for argument in expression.arguments if isinstance(argument, int | float)]
    inner = [argument for argument in expression.arguments if isinstance(argument, Call) or argument is LOGITS]
    scale = _scale_of(inner[0]) if len(factors) == len(inner) == 1 else None
    return None if scale is None else scale * factors[0]


def _softmax(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = kwargs.get("dim", args[0] if args else None)
    if not _is_last(lazy, dim):
        return NotImplemented
    dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
    function = torch.log_softmax if "log" in func.__name__ else torch.softmax
    return _record(lazy, function, (lazy.expression, -1), {"dtype": dtypes[0]} if dtypes else {})


def _record(
    lazy: LazyLogits, func: Callable[..., Any], arguments: tuple[Any, ...], kwargs: dict[str, Any]
) -> LazyLogits:
    return lazy.derived(Call(func, arguments, kwargs, autocast_state(lazy.linear.terms[0][0].device.type)))


# --- reductions over the vocabulary and losses


def _is_last(lazy: LazyLogits, dim: Any) -> bool:
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, lazy.shadow.dim() - 1)


def _reduce(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    if not _is_last(lazy, dim) or "out" in kwargs:
        return NotImplemented
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    dtype = {"dtype": kwargs["dtype"]} if kwargs.get("dtype") is not None else {}
    function = getattr(torch, func.__name__)
    result = map_rows(lazy.checked(), lazy.expression, lambda z: function(z, dim=-1, **dtype))
    lazy.evaluated(result)
    result = result.reshape(lazy.linear.leading_shape)
    return result.unsqueeze(-1) if keepdim else result


def _gather(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = kwargs.get("dim", args[0] if args else None)
    index: Any = kwargs.get("index", args[1] if len(args) > 1 else None)
    if not _is_last(lazy, dim) or index.shape[:-1] != lazy.shadow.shape[:-1] or index.dim() != lazy.shadow.dim():
        return NotImplemented
    rows = index.reshape(lazy.linear.leading_shape.numel(), index.shape[-1])
    result = map_rows(lazy.checked(), lazy.expression, lambda z, i: z.gather(-1, i), rows)
    lazy.evaluated(result)
    return result.reshape(index.shape)


def _cross_entropy(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    named = dict(zip(names, args, strict=False))
    return _loss(lazy, func, **named, **kwargs)


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
    unusual = weight is not None or size_average is not None or reduce is not None
    if unusual or lazy.shadow.dim() != 2 or target.dim() != 1 or target.dtype not in _INTEGERS:
        return NotImplemented
    if target.shape[0] != lazy.shadow.shape[0] or reduction not in ("none", "sum", "mean"):
        return NotImplemented
    linear = lazy.checked()
    if func is F.cross_entropy and not label_smoothing and _is_plain(lazy, target):
        result = linear.inside_head(lambda layer: _fused(layer, target, reduction, ignore_index))
        autocast, _ = autocast_state(result.device.type)
        result = result if autocast else result.to(lazy.shadow.dtype)
    else:
        smoothing = {"label_smoothing": label_smoothing} if label_smoothing else {}
        options: dict[str, Any] = {"ignore_index": ignore_index, **smoothing}
        options["reduction"] = "none" if reduction == "none" else "sum"
        over_rows = map_rows if reduction == "none" else sum_over_rows
        result = over_rows(linear, lazy.expression, lambda z, t: func(z, t, **options), target)
        if reduction == "mean":
            result = result / (target != ignore_index).sum().clamp(min=1)
    lazy.evaluated(result)
    return result


def _is_plain(lazy: LazyLogits, target: Tensor) -> bool:
    """Whether these are a linear layer's logits as they are, or 16 bits of them cast to fp32."""
    if len(lazy.linear.terms) != 1 or target.dtype not in (torch.int64, torch.int32):
        return False
    if lazy.expression is LOGITS:
        return True
    cast = lazy.expression
    narrow = lazy.linear.terms[0][0].element_size() == 2
    return isinstance(cast, Call) and cast.function is T.to and cast.arguments == (LOGITS, torch.float32) and narrow


def _fused(layer: Linear, target: Tensor, reduction: str, ignore_index: int) -> Tensor:
    ((x, weight, bias),) = layer.terms
    with torch.autocast(x.device.type, enabled=False):  # it had its say when the head ran
        return linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction, ignore_index=ignore_index)


# --- the table


def _named(*names: str) -> list[Callable[..., Any]]:
    """The method, the function and the functional of each name, where there is one."""
    spaces = (T, torch, F)
    return [getattr(space, name) for name in names for space in spaces if callable(getattr(space, name, None))]


_FUNCTIONS: dict[Rule, list[Callable[..., Any]]] = {
    _reshape: _named("view", "reshape", "view_as", "reshape_as"),
    _along_rows: _named(
        *("flatten", "unsqueeze", "squeeze", "transpose", "swapaxes", "swapdims", "split", "chunk", "unbind"),
        *("select", "narrow", "index_select"),
    ),
    _permute: _named("permute"),
    _iterate: [T.__iter__],
    _getitem: [T.__getitem__],
    _clone: _named("clone", "contiguous"),
    _detach: _named("detach"),
    _cast: [*CASTS, T.to, T.type_as],
    _pointwise: _named(
        *("mul", "div", "add", "sub", "true_divide", "multiply", "divide", "neg", "pow", "square"),
        *("clamp", "clamp_min"),
        *("tanh", "exp", "log", "sigmoid", "logsigmoid", "relu", "nan_to_num"),
        *("__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__add__", "__radd__", "__sub__", "__rsub__"),
        *("__neg__", "__pow__"),
    ),
    _softmax: _named("log_softmax", "softmax"),
    _reduce: _named("logsumexp", "sum", "mean", "argmax", "amax"),
    _gather: _named("gather"),
    _cross_entropy: [F.cross_entropy, F.nll_loss],
}
RULES: dict[Callable[..., Any], Rule] = {
    function: rule for rule, functions in _FUNCTIONS.items() for function in functions
}
REFLECTED: dict[Callable[..., Any], Rule] = dict.fromkeys(_named("mul", "div", "add", "sub"), _reflected)
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    **{T.mul_: T.mul, T.div_: T.div, T.add_: T.add, T.sub_: T.sub},
    **{T.__imul__: T.mul, T.__itruediv__: T.div, T.__iadd__: T.add, T.__isub__: T.sub},
    **{T.neg_: T.neg, T.exp_: T.exp, T.tanh_: T.tanh, T.clamp_: T.clamp},
}
