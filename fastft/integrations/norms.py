"""The root mean square norms of a model in training, by `layers/rms_norm.py`, where that is faster.

    weight * (x / sqrt(mean(x^2) + eps))

Which modules are such norms their code says, as for gated units: the instructions of their class's
`forward` (and `_norm`) are those of a function that stands here. Known are the norms of Llama,
which most decoders of transformers have (Mistral, Qwen, SmolLM), of OLMo 2, and of Gemma, which
adds 1 to the weight. Whatever differs, a shape or dtype, weights of another dtype, a GPU, compiled
code, passes without gradients, is the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastft.integrations.own_forward import (
    instructions,
    is_stock,
    is_unseen,
    put_forward,
    standing_for,
)
from fastft.layers.normed_linear import remembered
from fastft.layers.rms_norm import is_ahead, rms_norm, takes


def _as_llama(self: Any, hidden_states: Tensor) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _as_olmo(self: Any, hidden_states: Tensor) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


def _as_gemma(self: Any, x: Tensor) -> Any:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def _norm(self: Any, x: Tensor) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


# the name of eps, and what is added to the weight
_OPTIONS: dict[Any, tuple[str, float]] = {
    _as_llama: ("variance_epsilon", 0.0),
    _as_olmo: ("variance_epsilon", 0.0),
    _as_gemma: ("eps", 1.0),
}
_FORMS = {
    (instructions(forward.__code__), inner and instructions(inner.__code__)): forward
    for forward, inner in ((_as_llama, None), (_as_olmo, None), (_as_gemma, _norm))
}


def _form_of(module: nn.Module) -> Callable[[Any, Tensor], Any] | None:
    """Which of the norms above it is; None where it is none."""
    function, inner = type(module).forward, getattr(type(module), "_norm", None)
    if not isinstance(function, FunctionType) or function.__defaults__ or not is_stock(module):
        return None
    if inner is not None and (not isinstance(inner, FunctionType) or "_norm" in vars(module)):
        return None
    code = function.__code__
    if "_norm" not in code.co_names:
        inner = None
    if (inner or function).__globals__.get("torch") is not torch:
        return None
    found = _FORMS.get((instructions(code), inner and instructions(inner.__code__)))
    same = found is not None and code.co_varnames[1] == found.__code__.co_varnames[1]
    return found if same else None


def _code(module: nn.Module) -> tuple[Any, ...]:
    """What its class computes by, and what the module has in its place."""
    return type(module).forward, getattr(type(module), "_norm", None), vars(module).get("_norm")


def _forward_of(form: Any, used: set[int], known: dict[type, Any]) -> Callable[..., Any]:
    """The `forward` of norms of this form while the code of their class is the `known` one; ids of
    those that had the kernel go into `used`."""
    eps_name, offset = _OPTIONS[form]

    def computed(self: Any, x: Tensor) -> Any:
        eps, weight = getattr(self, eps_name), self.weight
        trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not (trains and isinstance(eps, float) and takes(x, weight)):
            return NotImplemented
        if known.get(type(self)) != _code(self):
            return NotImplemented
        used.add(id(self))
        # who sees a result may write to it where torch does not count it
        of = remembered if is_unseen(self) else rms_norm
        return of(x, weight, eps, offset)

    return standing_for(form, computed, form.__code__.co_varnames[1])


def use_own_norms(model: nn.Module, stack: contextlib.ExitStack) -> set[int] | None:
    """Gives the norms of `model` fastft's kernel until `stack` is closed, where it is faster;
    returns the ids of those that have had it, which grow with the first forward passes; None where
    none may have it."""
    used: set[int] = set()
    known: dict[type, Any] = {}  # empty from the end on, also for who has kept a norm's method
    stack.callback(known.clear)
    forwards: dict[Any, Any] = {form: _forward_of(form, used, known) for form in _OPTIONS}
    for module in model.modules() if is_ahead() else ():
        form = _form_of(module)
        if form is not None:
            known[type(module)] = _code(module)
            stack.callback(put_forward(module, forwards[form]))
    return used if known else None
