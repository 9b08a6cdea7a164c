"""The contract between an operation and its engines.

Each room defines its operators here with a schema, an eager reference and a fake, so that `torch.ops.fastft.*` exists
on every machine; the native libraries add kernels under torch's CPU and CUDA dispatch keys. A Triton engine is the
function of the operator's name in the module `<room>_triton`, which is imported when it is first asked for; it is an
operator of its own, `torch.ops.fastft.<name>_triton`, so that torch.compile does not look into it either.
`impl=` says how an operation is computed, never what: "auto" takes the best engine there is, an explicit
one never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from fastft import _native, foreign

library = torch.library.Library("fastft", "DEF")
LIBRARIES = {"cpp": "cpu", "cuda": "cuda"}  # the native engines: each has a library, named as the device type it serves
DEVICES = {**LIBRARIES, "triton": "cuda"}  # the device type that each engine serves
IMPLS = ("auto", "eager", *DEVICES)
OPERATORS: dict[str, Operator] = {}  # filled by the rooms at import; `python -m fastft` lists it


def check_impl(impl: str) -> None:
    """Raises ValueError if `impl` is no engine's name."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def check_beside(operator: str, first: str, on: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises RuntimeError unless the tensors are on the device of `on`: a kernel would read an address that is not."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != on.device:
            raise RuntimeError(
                f"{operator}: {name} is on {tensor.device}; it must be on the device of {first}, {on.device}"
            )


@functools.cache
def triton_missing() -> str | None:
    """Why no Triton kernel can run; None if one can on a device that Triton supports."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


class Operator:
    """One operator of `torch.ops.fastft`: its schema, its eager reference and the native engines which implement it.

    Args:
        schema: as `torch.library.Library.define` takes it, e.g. `"adamw_(Tensor(a!)[] params, ...) -> ()"`.
        reference: plain torch with the schema's signature; runs where no native engine does, and as `impl="eager"`.
        engines: which engines have a kernel, out of `"cpp"` (CPU), `"cuda"` and `"triton"`, the preferred ones first.
        fake: shape inference for `torch.compile`; None for an operator that returns nothing.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        *,
        engines: tuple[str, ...],
        fake: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.reference, self.engines = schema.partition("(")[0], reference, engines
        self.qualified_name = f"fastft::{self.name}"
        library.define(schema)
        # the key under which torch looks when a device has no kernel of its own
        library.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified_name, fake or (lambda *args, **kwargs: None), lib=library)
        for engine in set(engines) & set(LIBRARIES):
            _native.library(LIBRARIES[engine])
        self.native = getattr(torch.ops.fastft, self.name).default
        if "triton" in engines:
            twin = f"{self.name}_triton"
            library.define(schema.replace(self.name, twin, 1))
            library.impl(twin, lambda *args: self._triton_function()(*args), "CUDA")
            torch.library.register_fake(f"fastft::{twin}", fake or (lambda *args, **kwargs: None), lib=library)
            self.triton = getattr(torch.ops.fastft, twin).default
        OPERATORS[self.name] = self

    def _triton_function(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{self.reference.__module__}_triton"), self.name)

    def unavailable(self, engine: str, device: torch.device) -> str | None:
        """Why `engine` cannot compute this operator on `device`; None if it can."""
        if engine not in self.engines:
            return f"{self.name} has no {engine} kernel"
        if device.type != DEVICES[engine]:
            return f"it computes {DEVICES[engine]} tensors, these are on {device.type}"
        if engine == "triton":
            return triton_missing()
        return _native.missing("cpu") if engine == "cpp" else _native.cuda_unusable(device.index or 0)

    @foreign.constant_when_compiled  # no compiler can trace the loading of a library
    def resolve(self, impl: str, device: torch.device) -> str:
        """The engine that `impl` means on `device`: "eager" or one of `engines`.

        Raises:
            ValueError: `impl` is no engine's name.
            RuntimeError: the engine asked for is not available; says why.
        """
        check_impl(impl)
        if impl == "eager":
            return impl
        if impl == "auto":  # "cuda" stands before "triton" in `engines`: not yet measured against each other on a GPU
            return next((engine for engine in self.engines if self.unavailable(engine, device) is None), "eager")
        reason = self.unavailable(impl, device)
        if reason is not None:
            raise RuntimeError(f"impl={impl!r} is not available for {self.name}: {reason}")
        return impl

    def implementation(self, impl: str, device: torch.device) -> Callable[..., Any]:
        """The function that computes this operator with `impl` on tensors of `device`; raises as `resolve` does."""
        engine = self.resolve(impl, device)
        return self.reference if engine == "eager" else self.triton if engine == "triton" else self.native
