"""Compiles Triton kernels for GPUs that are not there, and reads from the machine code what became of them.

with compiled_for(90) as launches:
    wrapper(...)  # any Python that launches Triton kernels, with tensors of the device "meta"
binary(launches[0]).spills
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from support.machine_code import Binary, binaries


class _Driver(DriverBase):
    """What Triton asks of a driver to compile and nothing more."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        limits = {"max_shared_mem": 166_912 if capability == 80 else 232_448, "max_num_regs": 65_536, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda device: limits)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def compiled_for(capability: int) -> Iterator[list[Any]]:
    """Compiles every launch in the block for sm_<capability> and yields the list of compiled kernels."""
    kernels: list[Any] = []
    stock_run, active = JITFunction.run, triton.runtime.driver._active

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel.result() if hasattr(kernel, "result") else kernel)

    triton.runtime.driver.set_active(_Driver(capability))
    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run, triton.runtime.driver._active = stock_run, active


def binary(kernel: Any) -> Binary:
    """The machine code of a kernel out of `compiled_for`."""
    (code,) = binaries(kernel.asm["cubin"]).values()
    return code
