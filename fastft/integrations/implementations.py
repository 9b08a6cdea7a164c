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
def parts_that_run(base: nn.Module) -> Iterator[set[str]]:
    """The names of the modules with a configuration that are called inside this context.

    Towers for images and sounds are not called for a text: nothing is known of their attention.
    """
    ran: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for name, module in base.named_modules():
            if hasattr(module, "config"):

                def note(module: nn.Module, args: Any, name: str = name) -> None:
                    ran.add(name)

                hooks.callback(module.register_forward_pre_hook(note).remove)
        yield ran


def stock_parts(base: nn.Module, names: set[str]) -> tuple[str, ...]:
    """Chooses of these modules those with sdpa or eager attention that take another one's name, one
    for each configuration. Attention that the user chose (flash, flex, ours) is left out."""
    parts: dict[int, str] = {}
    for name, module in base.named_modules():
        config: Any = getattr(module, "config", None)
        takes = getattr(module, "_can_set_attn_implementation", lambda: False)
        if name in names and getattr(config, "_attn_implementation", None) in STOCK and takes():
            parts.setdefault(id(config), name)
    return tuple(parts.values())
