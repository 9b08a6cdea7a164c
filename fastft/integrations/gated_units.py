"""The gated units of a model in training, by `layers/swiglu.py`, where that is faster.

    down_proj(silu(gate_proj(x)) * up_proj(x))

Which modules are such units their code says: the instructions of their class's `forward` are those
of a function that stands here, as in most decoders of transformers (Llama, Mistral, Qwen, SmolLM),
so that nobody keeps a list of their classes. The three layers are called in their order, with their
hooks and adapters; a `down_proj` that is a trained `nn.Linear` and nothing more is a product whose
input is not kept (layers/gated_down.py). Under autocast the kernel takes the dtypes that the layers
give. Whatever differs, another activation or one with hooks, another shape or dtype, a GPU,
compiled code, is the model's, and so are passes without gradients: there a layer may write its
result where another one had its own, and the activation waits for `up_proj` here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from fastft.integrations.linear_products import times_of
from fastft.integrations.own_forward import (
    instructions,
    is_stock,
    is_unseen,
    put_forward,
    standing_for,
)
from fastft.layers.gated_down import gated_down
from fastft.layers.swiglu import is_ahead, swiglu, takes


def _returned(self: Any, x: Tensor) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _assigned(self: Any, x: Tensor) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


_FORMS = {instructions(form.__code__) for form in (_returned, _assigned)}
# as they were found: whoever replaces one of them wants another activation
_SILU, _FORWARDS = F.silu, {kind: kind.forward for kind in (nn.SiLU, SiLUActivation)}


def _argument_of(module: nn.Module) -> str | None:
    """The name of the argument of a unit's `forward`; None where the module is no unit."""
    function = type(module).forward
    if not isinstance(function, FunctionType) or function.__defaults__ or not is_stock(module):
        return None
    code = function.__code__
    return code.co_varnames[1] if instructions(code) in _FORMS else None


def _is_plain_silu(activation: Any) -> bool:
    """Whether it is silu, and nobody else sees what it is given or gives."""
    forward = _FORWARDS.get(type(activation))
    return (
        forward is not None
        and getattr(activation.forward, "__func__", None) is forward
        and F.silu is _SILU
        and not getattr(activation, "inplace", False)
        and is_unseen(activation)
    )


def _computed_of(used: set[int], known: dict[type, Any]) -> Callable[[Any, Tensor], Any]:
    """What computes a unit while the `forward` of its class is the `known` one; ids of those that
    had the kernel go into `used`."""

    def computed(self: Any, x: Tensor) -> Any:
        if known.get(type(self)) is not type(self).forward:
            return NotImplemented
        gate = self.gate_proj(x)
        if not (gate.requires_grad and takes(gate) and _is_plain_silu(self.act_fn)):
            return self.down_proj(self.act_fn(gate) * self.up_proj(x))
        up = self.up_proj(x)
        if not takes(gate, up):
            return self.down_proj(self.act_fn(gate) * up)
        used.add(id(self))
        times = times_of(self.down_proj, gate)
        if times is None:
            return self.down_proj(swiglu(gate, up))
        return gated_down(gate, up, self.down_proj.weight, times)

    return computed


def use_own_units(model: nn.Module, stack: contextlib.ExitStack) -> set[int]:
    """Gives the gated units of `model` fastft's kernel until `stack` is closed, where it is faster;
    returns the ids of those that have had it, which grow with the first forward passes."""
    used: set[int] = set()
    known: dict[type, Any] = {}  # empty from the end on, also for who has kept a unit's method
    computed = _computed_of(used, known)
    stack.callback(known.clear)
    for module in model.modules() if is_ahead() else ():
        argument = _argument_of(module)
        if argument is not None and _is_plain_silu(getattr(module, "act_fn", None)):
            known[type(module)] = type(module).forward
            forward = standing_for(_returned, computed, argument)
            stack.callback(put_forward(module, forward))
    return used
