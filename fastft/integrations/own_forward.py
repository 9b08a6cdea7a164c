"""A `forward` of fastft's on one module of a model, for the time of a training.

It hides the class's by an attribute of that one instance: state dicts, hooks and classes stay.
Every copy of the module (`copy`, pickles, the replicas of `nn.DataParallel`) is a stock one with
weights of its own, and so is what `torch.jit.script` makes of it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch  # by this name, which torch.jit looks for where a `forward` of ours was defined

from fastft.foreign.objects import put_attributes

_PUT = ("forward", "__getstate__", "_replicate_for_data_parallel")


# what makes more of a function than a call with one result
_KINDS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR
_KINDS |= inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def instructions(code: CodeType) -> tuple[Any, ...]:
    """What a function does, but for its docstring, the names of its variables and where it was
    defined."""
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    described = bool(code.co_consts) and isinstance(code.co_consts[0], str | None)
    # by type and text: 2, 2.0 and True are equal
    constants = tuple((type(value), repr(value)) for value in code.co_consts[described:])
    flags = code.co_flags & _KINDS
    return code.co_code, code.co_names, code.co_freevars, constants, counts, flags


def is_stock(module: torch.nn.Module) -> bool:
    """Whether its `forward` is its class's. Another one (lazy logits, accelerate's offloading, a
    tensor-parallel plan) is somebody's."""
    return bool(module.forward == types.MethodType(type(module).forward, module))


def is_unseen(module: torch.nn.Module) -> bool:
    """Whether nobody else sees what its `forward` is given or gives."""
    hooks = (
        "_forward_pre_hooks _forward_hooks _backward_pre_hooks _backward_hooks "
        "_forward_hooks_always_called"
    )
    seen = any(getattr(module, name) for name in hooks.split())
    return not (seen or torch.nn.modules.module._has_any_global_hook())


def standing_for(
    form: Callable[..., Any], computed: Callable[[Any, Any], Any], argument: str
) -> Callable[..., Any]:
    """A `forward` with one argument beside the module.

    Args:
        form: a function of what is computed, which torch.jit compiles in its place.
        argument: its name.
        computed: takes the module and the argument; NotImplemented: the class's `forward` does it.
    """

    # of this name and a function, so that the module's method pickles
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        if len(given) + len(named) == 1 and named.keys() <= {argument}:
            y = computed(self, *given, *named.values())
            if y is not NotImplemented:
                return y
        return type(self).forward(self, *given, **named)

    forward.__wrapped__ = form  # type: ignore[attr-defined]
    return forward


def put_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Gives a stock module a method in the place of its `forward`, which no copy of it has: a
    method in a copied `__dict__` would still be the first module's. Returns what takes it off
    again.

    Args:
        forward: a function of this name, so that the method pickles and torch.jit compiles it.
    """

    def stock(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {name: value for name, value in state.items() if name not in _PUT}

    def state() -> Any:
        own = getattr(type(module), "__getstate__", None)
        # what every object has, from Python 3.11 on, would find this one
        if own is None or own is getattr(object, "__getstate__", None):
            return stock(vars(module))
        return stock(own(module))

    def replicate() -> torch.nn.Module:
        replica = type(module)._replicate_for_data_parallel(module)
        replica.__dict__ = stock(vars(replica))
        return replica

    method = types.MethodType(forward, module)
    values = (method, state, replicate)
    return put_attributes(module, **dict(zip(_PUT, values, strict=True)))
