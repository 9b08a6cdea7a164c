"""`attn_implementation="fastft"` is known to transformers from the moment on that its models are.

The registry is a class of `transformers.modeling_utils`, which takes seconds to import and which
`import fastft` must not import. Where it is there already, the name is registered at once; else a
finder waits for its import, lets it happen as it would have, registers the name behind it and is
gone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from fastft.attention.attention import register_attention

REGISTRY = "transformers.modeling_utils"


class _Registering(Loader):
    """The loader of the registry's module, and the registration behind it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # not ours to fail: an explicit register_attention() says why
        with contextlib.suppress(Exception):
            register_attention()


class _Waiting(MetaPathFinder):
    """Finds the registry's module with the other finders, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Registers the name now, or when `transformers.modeling_utils` is imported. Imports nothing
    and never raises."""
    if REGISTRY in sys.modules:
        with contextlib.suppress(Exception):
            register_attention()
    elif not any(type(finder) is _Waiting for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
