"""The gated units of a model in training, by `layers/swiglu.py`, where that is faster.

    down_proj(silu(gate_proj(x)) * up_proj(x))

Which modules are such units their code says: the instructions of their class's `forward` are those
of a function that stands here, as in most decoders of transformers (Llama, Mistral, Qwen, SmolLM),
so that nobody keeps a list of their classes. The three layers are called as ever, with their hooks
and adapters. Under autocast the kernel takes the dtypes that the layers give. Whatever differs,
another activation or one with hooks, another shape or dtype, a GPU, compiled code, is the model's.
"""

from __future__ import annotations
import __future__

import contextlib
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from fastft.integrations.own_forward import is_stock, put_forward
from fastft.layers.swiglu import is_ahead, swiglu, takes


def _returned(self: Any, x: Tensor) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _assigned(self: Any, x: Tensor) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _instructions(code: CodeType) -> tuple[Any, ...]:
    """What a function does, but for the names of its variables."""
    kind = code.co_flags & ~__future__.annotations.compiler_flag
    return code.co_code, code.co_names, code.co_argcount, code.co_freevars, kind


_FORMS = {_instructions(form.__code__) for form in (_returned, _assigned)}


def _is_unit(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return isinstance(code, CodeType) and _instructions(code) in _FORMS and is_stock(module)


def _is_plain_silu(activation: Any) -> bool:
    """Whether it is silu, and nobody else sees what it is given or gives."""
    hooks = (
        "_forward_pre_hooks _forward_hooks _backward_pre_hooks _backward_hooks "
        "_forward_hooks_always_called"
    )
    return (
        type(activation) in (nn.SiLU, SiLUActivation)
        and not getattr(activation, "inplace", False)
        and is_stock(activation)
        and not any(getattr(activation, name) for name in hooks.split())
        and not nn.modules.module._has_any_global_hook()
    )


def _forward_of(used: set[int]) -> Callable[[Any, Tensor], Any]:
    """The units' `forward` while the kernel is on; ids of those that had it go into `used`."""

    def forward(self: Any, x: Tensor) -> Any:
        if not torch.jit.is_scripting():
            gate = self.gate_proj(x)
            if not (takes(gate) and _is_plain_silu(self.act_fn)):
                return self.down_proj(self.act_fn(gate) * self.up_proj(x))
            up = self.up_proj(x)
            if not takes(gate, up):
                return self.down_proj(self.act_fn(gate) * up)
            used.add(id(self))
            return self.down_proj(swiglu(gate, up))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    return forward


def use_own_units(model: nn.Module, stack: contextlib.ExitStack) -> set[int]:
    """Gives the gated units of `model` fastft's kernel until `stack` is closed, where it is faster;
    returns the ids of those that have had it, which grow with the first forward passes."""
    used: set[int] = set()
    forward = _forward_of(used)
    for module in model.modules():
        if is_ahead() and _is_unit(module) and _is_plain_silu(getattr(module, "act_fn", None)):
            stack.callback(put_forward(module, forward))
    return used
