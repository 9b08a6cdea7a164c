"""Something to do when another library's module is imported, and not a moment before.

transformers takes seconds to import. Who wants to add to it, and must not import it, waits: where
the module is there already the work is done at once; else a finder lets the import happen as it
would have, does the work behind it and is gone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Waiting(MetaPathFinder):
    """Finds one module as the finders behind this one do, until it has been executed."""

    def __init__(self, module: str, do: Callable[[ModuleType], None]) -> None:
        self._module, self._do = module, do

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._module:
            return None
        # who only asks whether there is such a module asks here as well: nothing ends with that
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        finds = (getattr(finder, "find_spec", None) for finder in behind)  # as import has it
        specs = (find(name, path, target) for find in finds if find is not None)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec

    def executed(self, module: ModuleType) -> None:
        if self in sys.meta_path:
            self.stop()
            self._do(module)

    def stop(self) -> None:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)


class _Then(Loader):
    """The loader of a module, and what waits for it."""

    def __init__(self, loader: Loader, waiting: _Waiting) -> None:
        self._loader, self._waiting = loader, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._waiting.executed(module)


def when_imported(module: str, do: Callable[[ModuleType], None]) -> Callable[[], None]:
    """Calls `do` with the module: now, if it is imported, or right behind its import.

    What `do` raises is raised by that import.

    Args:
        module: the full name, as "transformers.trainer".
        do: gets the module, executed.

    Returns:
        A function that gives up waiting. Harmless when nothing waits any more.
    """
    waiting = _Waiting(module, do)
    if module in sys.modules:
        do(sys.modules[module])
    else:
        sys.meta_path.insert(0, waiting)
    return waiting.stop
