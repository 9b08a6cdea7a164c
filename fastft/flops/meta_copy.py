"""A model's twin on the meta device: its code, its settings, and tensors without numbers.

The twin is built module by module around the attributes of the original. Nothing large is copied,
and nothing of the original is called or written to. What others have put onto the model is left
out: hooks, a `forward` of one instance alone (accelerate's, fastft's), compiled calls, wrappers,
gradient checkpointing. So the twin computes once what the model's classes say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign.models import is_config, without_checkpointing
from fastft.foreign.tensors import full_shape

# what a module's instance has of others; "forward" there is a patch, as is a compiled call
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_PATCHES = ("forward", "_compiled_call_impl")
_ENGINES = {  # every product is one that torch's counter knows, and runs on the meta device
    "_attn_implementation_internal": "eager",
    "_experts_implementation_internal": "batched_mm",
}


def meta_copy(model: nn.Module) -> Any:
    """Makes the twin of `model` in training mode, fp32, with the same parameters to be trained.

    An `nn.Linear` of quantised weights becomes a plain one. Attention is
    transformers' eager one, and experts are batched products.
    """
    return _Copier().module(model)


class _Copier:
    def __init__(self) -> None:
        self._made: dict[int, Any] = {}  # by the id of the original: tied parts stay tied
        self._originals: list[Any] = []  # held, so that no id is given twice

    def _once(self, original: Any, make: Callable[[], Any]) -> Any:
        if id(original) not in self._made:
            self._originals.append(original)
            self._made[id(original)] = make()
        return self._made[id(original)]

    def module(self, original: nn.Module) -> Any:
        inside = without_checkpointing(original)
        kind = nn.Linear if _is_quantised(inside) else type(inside)
        twin = self._once(inside, lambda: object.__new__(kind))
        if not vars(twin):
            self._fill(twin, inside)
        return twin

    def _fill(self, twin: Any, original: nn.Module) -> None:
        attributes = {key: value for key, value in vars(original).items() if key not in _PATCHES}
        vars(twin).update(attributes, training=True, **{name: {} for name in _HOOKS})
        for key, value in attributes.items():
            if key == "_parameters":
                made: Any = {name: self._parameter(part, original) for name, part in value.items()}
            elif key in ("_buffers", "_modules"):
                made = {name: self.value(part) for name, part in value.items()}
            elif key in _HOOKS:
                continue
            else:
                made = self._setting(key, value)
            vars(twin)[key] = made

    def value(self, original: Any) -> Any:
        """An attribute of a module: parts and tensors as twins, all else as it is."""
        if isinstance(original, nn.Module):
            return self.module(original)
        if isinstance(original, Tensor):
            return self._once(original, lambda: _empty(original, full_shape(original)))
        if is_config(original):
            return self._once(original, lambda: self._config(original))
        if type(original) in (list, tuple) and any(isinstance(p, nn.Module) for p in original):
            return type(original)(self.value(part) for part in original)
        return original

    def _setting(self, name: str, value: Any) -> Any:
        if name == "gradient_checkpointing":
            return False
        return 0.0 if _is_layerdrop(name, value) else self.value(value)

    def _parameter(self, original: nn.Parameter | None, holder: Any) -> nn.Parameter | None:
        if original is None:
            return None
        shape, trained = full_shape(original), original.requires_grad
        if _is_quantised(holder) and original is holder.weight:
            shape, dtype = torch.Size((holder.out_features, holder.in_features)), torch.float32
            empty = _empty(original, shape, dtype)
        else:
            empty = _empty(original, shape)
        return self._once(original, lambda: nn.Parameter(empty, requires_grad=trained))

    def _config(self, original: Any) -> Any:
        twin = copy.deepcopy(original)
        parts = [twin, *(getattr(twin, name, None) for name in getattr(twin, "sub_configs", {}))]
        parts = [part for part in parts if part is not None]
        for part in parts:
            for name, engine in _ENGINES.items():
                if hasattr(part, name):
                    setattr(part, name, engine)
            dropped = [name for name, value in vars(part).items() if _is_layerdrop(name, value)]
            vars(part).update(dict.fromkeys(dropped, 0.0))
        return twin


def _is_quantised(module: nn.Module) -> bool:
    """Whether this is a linear layer whose weight is packed, or has a scale beside it."""
    return isinstance(module, nn.Linear) and module.weight.element_size() < 2


def _is_layerdrop(name: str, value: Any) -> bool:
    """Whether this is the share of layers that are left out by chance."""
    return name.endswith("layerdrop") and isinstance(value, float)


def _empty(original: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or (torch.float32 if original.is_floating_point() else original.dtype)
    return torch.empty(shape, dtype=dtype, device="meta")
