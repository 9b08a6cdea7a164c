"""The contract between an operation and its engines.

Each room defines its operators here with a schema, an eager reference and a fake, so that
`torch.ops.fastft.*` exists on every machine; the native libraries add kernels under torch's CPU and
CUDA dispatch keys. A Triton engine is the function of the operator's name in the module
`<room>_triton`, which is imported when it is first asked for; it is an operator of its own,
`torch.ops.fastft.<name>_triton`, so that torch.compile does not look into it either.

`impl=` says how an operation is computed, never what: "auto" takes the first engine that is
available on the device and suits the call, an explicit one never falls back. `unavailable` tells
whether an engine can compute on a device at all, its rule whether it can compute a call: of what
decides (dtypes, sizes, options), which the room hands to `resolve`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import _native
from fastft.foreign import compiling

# Of a device and what decides a call: why an engine cannot compute it, a part of a sentence; None
# if it can.
Rule = Callable[..., str | None]


def takes(*dtypes: torch.dtype) -> Rule:
    """The rule of an engine that has kernels for these dtypes alone."""

    def rule(device: torch.device, *asked: torch.dtype) -> str | None:
        other = next((dtype for dtype in asked if dtype not in dtypes), None)
        return None if other is None else f"it has no kernel for {other}"

    return rule


class Engine(NamedTuple):
    """Where an engine computes: on which device types (empty: all), and why it cannot on one such
    device."""

    devices: tuple[str, ...] = ()
    missing: Callable[[torch.device], str | None] = lambda device: None

    def serves(self, device: torch.device) -> bool:
        """Whether it computes on devices of this type, where nothing is missing."""
        return not self.devices or device.type in self.devices


def check_beside(
    operator: str, first: str, on: torch.Tensor, **others: torch.Tensor | None
) -> None:
    """Raises RuntimeError unless the tensors are on the device of `on`: a kernel would read an
    address that is not."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != on.device:
            raise RuntimeError(
                f"{operator}: {name} is on {tensor.device}; it must be on the device of {first}, "
                f"{on.device}"
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


def _triton_missing_on(device: torch.device) -> str | None:
    reason = triton_missing()
    if reason is None:
        backend = "intel" if device.type == "xpu" else "amd" if torch.version.hip else "nvidia"
        if backend not in importlib.import_module("triton.backends").backends:
            reason = f"this triton has no backend for {backend}"
        elif backend == "nvidia" and torch.version.cuda is None:
            reason = "this torch build has no CUDA"
        elif backend == "nvidia" and not torch.cuda.is_available():
            reason = "torch finds no NVIDIA GPU"
        elif backend == "nvidia" and capability(device) < OLDEST_TRITON:
            reason = too_old(device, OLDEST_TRITON)
    return reason


def _cuda_missing_on(device: torch.device) -> str | None:
    if device.index is not None:
        return _native.cuda_unusable(device.index)
    # without the library torch may have no CUDA, and so no current device
    return _native.missing("cuda") or _native.cuda_unusable(torch.cuda.current_device())


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; without an index, of the current one."""
    return torch.cuda.get_device_capability(device)


def too_old(device: torch.device, needed: tuple[int, int]) -> str:
    """The reason that a GPU lacks the compute capability which an engine needs."""
    return "it needs compute capability {}.{}, this GPU has {}.{}".format(
        *needed, *capability(device)
    )


@functools.cache
def wave(device: torch.device) -> int:
    """How many threads of a Triton program run as one: 64 on AMD's data-centre GPUs, else 32."""
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32


# of NVIDIA's GPUs, the oldest that the Triton kernels are compiled for in tests
OLDEST_TRITON = (7, 5)
library = torch.library.Library("fastft", "DEF")
# the native engines: each has a library, named as the device type it serves
LIBRARIES = {"cpp": "cpu", "cuda": "cuda"}
ENGINES = {
    "cpp": Engine(("cpu",), lambda device: _native.missing("cpu")),
    # ROCm's torch calls its devices so too, and the reason says so
    "cuda": Engine(("cuda",), _cuda_missing_on),
    "triton": Engine(("cuda", "xpu"), _triton_missing_on),
}
IMPLS = ("auto", "eager", *ENGINES)
OPERATORS: dict[str, Operation] = {}  # filled by the rooms at import; `python -m fastft` lists it


def check_impl(impl: str, impls: tuple[str, ...] = IMPLS) -> None:
    """Raises ValueError if `impl` is none of `impls`."""
    if impl not in impls:
        raise ValueError(f"impl must be one of {', '.join(map(repr, impls))}, got {impl!r}")


class Operation:
    """What is computed, and the engines that can.

    Args:
        name: of the operation.
        reference: plain torch, `impl="eager"`: computes every call, where no engine does or it is
            asked for.
        engines: those which have a kernel, the preferred ones first, each with its rule; None where
            it computes every call.
        table: where each of them computes.
        samples: calls that `python -m fastft` asks about: what decides each, by its name.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        engines: Mapping[str, Rule | None],
        table: Mapping[str, Engine] = ENGINES,
        samples: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        self.name, self.reference, self.engines, self.table = name, reference, engines, table
        self.impls, self.samples = ("auto", "eager", *table), samples or {}
        OPERATORS[name] = self

    def unavailable(self, engine: str, device: torch.device) -> str | None:
        """Why `engine` cannot compute this operation on `device`, whatever the call; None if it
        can."""
        if engine not in self.engines:
            return f"{self.name} has no {engine} kernel"
        place = self.table[engine]
        if not place.serves(device):
            return f"it computes {' and '.join(place.devices)} tensors, these are on {device.type}"
        return place.missing(device)

    def suits(self, engine: str, device: torch.device, *what: Any) -> str | None:
        """Why `engine` cannot compute a call on `device` that is decided by `what`; None if it can.

        `what` is what the room's rules look at; without any, the answer is `unavailable`'s.
        """
        reason = self.unavailable(engine, device)
        rule = self.engines.get(engine)
        return rule(device, *what) if reason is None and rule is not None and what else reason

    @compiling.constant_when_compiled  # no compiler can trace the loading of a library
    def resolve(self, impl: str, device: torch.device, *what: Any) -> str:
        """The engine that `impl` means on `device` for a call decided by `what`: "eager" or one of
        `engines`.

        Raises:
            ValueError: `impl` is no engine's name.
            RuntimeError: the engine asked for is not available or does not suit; says why.
        """
        check_impl(impl, self.impls)
        if impl == "eager":
            return impl
        # "cuda" stands before "triton" in `engines`: not yet measured against each other on a GPU
        if impl == "auto":
            return next(
                (engine for engine in self.engines if self.suits(engine, device, *what) is None),
                "eager",
            )
        reason = self.suits(impl, device, *what)
        if reason is not None:
            raise RuntimeError(f"impl={impl!r} is not available for {self.name}: {reason}")
        return impl


class Operator(Operation):
    """One operator of `torch.ops.fastft`: its schema, its eager reference and the engines which
    implement it.

    Args:
        schema: as `torch.library.Library.define` takes it, e.g. `"adamw_(Tensor(a!)[] params, ...)
            -> ()"`.
        reference: plain torch with the schema's signature.
        engines: as of `Operation`, out of `"cpp"` (CPU), `"cuda"` and `"triton"`.
        fake: shape inference for `torch.compile`; None for an operator that returns nothing.
        samples: as of `Operation`.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        *,
        engines: Mapping[str, Rule | None],
        fake: Callable[..., Any] | None = None,
        samples: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        super().__init__(schema.partition("(")[0], reference, engines=engines, samples=samples)
        self.qualified_name = f"fastft::{self.name}"
        library.define(schema)
        # the key under which torch looks when a device has no kernel of its own
        library.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(
            self.qualified_name, fake or (lambda *args, **kwargs: None), lib=library
        )
        for engine in set(engines) & set(LIBRARIES):
            _native.library(LIBRARIES[engine])
        self.native = getattr(torch.ops.fastft, self.name).default
        if "triton" in engines:
            twin = f"{self.name}_triton"
            library.define(schema.replace(self.name, twin, 1))
            for device in ENGINES["triton"].devices:
                library.impl(twin, self._launch_triton, device.upper())
            torch.library.register_fake(
                f"fastft::{twin}", fake or (lambda *args, **kwargs: None), lib=library
            )
            self.triton = getattr(torch.ops.fastft, twin).default

    def _launch_triton(self, *args: Any) -> Any:
        """Triton launches on the current device, wherever its arguments are."""
        tensors = (
            part for arg in args for part in (arg if isinstance(arg, list | tuple) else (arg,))
        )
        there = next(
            part for part in tensors if isinstance(part, Tensor) and part.device.type != "cpu"
        )
        with getattr(torch, there.device.type).device_of(there):
            return self._triton_function()(*args)

    def _triton_function(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{self.reference.__module__}_triton"), self.name)

    def implementation(self, impl: str, device: torch.device, *what: Any) -> Callable[..., Any]:
        """The function that computes a call on tensors of `device` with `impl`; raises as `resolve`
        does."""
        engine = self.resolve(impl, device, *what)
        return (
            self.reference
            if engine == "eager"
            else self.triton
            if engine == "triton"
            else self.native
        )
