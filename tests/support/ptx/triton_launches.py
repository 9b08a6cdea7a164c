"""Launches of Triton kernels on CPU tensors: compiled for a GPU that is not there, and their PTX
run on the CPU."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction

from support.ptx.checks import Extent, Fault, GlobalMemory
from support.ptx.cuda import extent_of
from support.ptx.executor import Options, run_launch
from support.ptx.lanes import Launch
from support.ptx.parser import Kernel, Module
from support.triton_compiler import compiled_for

_SCRATCH = 2  # pointers that Triton adds to the parameters; our kernels use no such memory


@functools.cache
def _kernel(ptx: str) -> Kernel:
    (kernel,) = Module(ptx).values()
    return kernel


@contextlib.contextmanager
def triton_as_ptx(
    capability: int,
    *,
    memory: Sequence[Tensor] = (),
    edit: Callable[[str], str] = str,
    **options: Any,
) -> Iterator[list[Launch]]:
    """Runs every launch of Triton kernels in the block as PTX for sm_<capability> and yields the
    list of launches.

    Args:
        capability: 80 or 90, or another that Triton knows.
        memory: tensors which kernels touch beside their arguments, because they find their
            addresses in a table.
        edit: changes the PTX of every kernel, to plant a fault.
        options: those of `Options`.
    """
    launches: list[Launch] = []
    settings = Options(**options)
    with compiled_for(capability) as compiled:
        compile_only = JITFunction.run

        def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compile_only(self, *args, grid=grid, warmup=True, **kwargs)
            named = dict(zip(self.arg_names, args, strict=False)) | kwargs
            shape = grid(named) if callable(grid) else grid
            metadata = compiled[-1].metadata
            launches.append(
                Launch(metadata.name, (*shape, 1, 1)[:3], 32 * metadata.num_warps, metadata.shared)
            )
            _run(
                _kernel(edit(compiled[-1].asm["ptx"])),
                compiled[-1].src.signature,
                named,
                launches[-1],
                memory,
                settings,
            )

        JITFunction.run = run
        try:
            yield launches
        finally:
            JITFunction.run = compile_only


def _run(
    kernel: Kernel,
    signature: dict[str, str],
    arguments: dict[str, Any],
    launch: Launch,
    memory: Sequence[Tensor],
    options: Options,
) -> None:
    passed = {name: arguments[name] for name, kind in signature.items() if kind != "constexpr"}
    if len(kernel.parameters) - len(passed) not in range(_SCRATCH + 1):
        raise Fault("launch refused", f"{len(kernel.parameters)} parameters for {list(passed)}").at(
            launch.kernel, None
        )
    parameters = bytearray(kernel.parameter_bytes)
    for (name, value), (offset, size) in zip(
        passed.items(), kernel.parameters.values(), strict=False
    ):
        parameters[offset : offset + size] = _as_bytes(value, signature[name], size)
    tensors = [(name, value) for name, value in passed.items() if isinstance(value, Tensor)]
    tensors += [(f"memory {i}", tensor) for i, tensor in enumerate(memory)]
    extents = [extent_of(tensor, f"{name} {tuple(tensor.shape)}") for name, tensor in tensors]
    own: list[Extent] = [extent for extent in extents if extent is not None]
    run_launch(kernel, launch, bytes(parameters), GlobalMemory(own, checks=options.checks), options)


def _as_bytes(value: Any, kind: str, size: int) -> bytes:
    if isinstance(value, Tensor):
        return struct.pack("<Q", value.data_ptr())
    if kind.startswith("fp"):
        return struct.pack("<f" if size == 4 else "<d", value)
    return int(value).to_bytes(size, "little", signed=int(value) < 0)
