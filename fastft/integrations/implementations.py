"""The attention implementation that each part of a model names, and another one for a while.

transformers looks the functions for attention and its mask up in every forward, by the name that
the part's configuration has then. So a name can be changed between two forwards, of one part or of
all, and put back exactly: also where parts of a composite model, or encoder and decoder, differ.
The name is no part of a configuration that is saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fastft.attention.attention import NAME

STOCK = ("sdpa", "eager")  # transformers' own, which models have where nobody has chosen another


def attention_configs(model: nn.Module) -> list[Any]:
    """Finds the configurations inside a model that name an attention implementation."""
    found = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


@contextlib.contextmanager
def implementation_restored(model: nn.Module) -> Iterator[None]:
    """Gives all configurations at the end the attention implementation that they named before."""
    before = [(config, config._attn_implementation_internal) for config in attention_configs(model)]
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


@contextlib.contextmanager
def attention(base: Any, name: str) -> Iterator[None]:
    """Gives the whole model another attention implementation.

    Raises:
        ValueError: the model does not take it.
    """
    with implementation_restored(base):
        base.set_attn_implementation(name)
        if base.config._attn_implementation != name:
            raise ValueError(f"{type(base).__name__} has attention code of its own")
        yield


@contextlib.contextmanager
def switched(base: nn.Module, parts: Sequence[str]) -> Iterator[set[str]]:
    """Gives these modules of `base` attention "fastft", by their names; yields what they had."""
    configs: list[Any] = [base.get_submodule(part).config for part in parts]
    with implementation_restored(base):
        former = {str(config._attn_implementation_internal) for config in configs}
        for config in configs:
            config._attn_implementation_internal = NAME
        yield former


@contextlib.contextmanager
def stock_parts(base: nn.Module) -> Iterator[dict[int, str]]:
    """Gathers the modules that have sdpa or eager attention and are called inside this context.

    Their names, one for each configuration, and only where the module takes another attention's
    name. Attention that the user chose (flash, flex, ours) is left out, and eager attention that
    has to return its weights; so are towers for images and sounds, which are not called for a text:
    nothing is known of their attention.
    """
    called: dict[int, str] = {}
    names = {module: name for name, module in base.named_modules() if _may_be_given_ours(module)}

    def note(module: Any, args: Any) -> None:
        called.setdefault(id(module.config), names[module])

    with contextlib.ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(note).remove)
        yield called


def _may_be_given_ours(module: nn.Module) -> bool:
    config, takes = getattr(module, "config", None), "_can_set_attn_implementation"
    stock = getattr(config, "_attn_implementation", None) in STOCK
    returned = getattr(config, "output_attentions", False)
    return stock and not returned and getattr(module, takes, lambda: False)()
