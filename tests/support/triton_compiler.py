"""Compiles Triton kernels for GPUs that are not there, and reads from the machine code what became
of them.

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

from fastft import ops
from support.machine_code import Binary, binaries


class _Driver(DriverBase):
    """What Triton asks of a driver to compile and nothing more."""

    def __init__(self, chip: int | str) -> None:
        amd = isinstance(chip, str)
        self.target = GPUTarget("hip", chip, 64) if amd else GPUTarget("cuda", chip, 32)
        shared = 65_536 if amd or chip == 75 else 166_912 if chip == 80 else 232_448
        limits = {
            "max_shared_mem": shared,
            "max_num_regs": 65_536,
            "warpSize": self.target.warp_size,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: limits)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        arch = self.target.arch  # Triton keeps compiled kernels by device
        return int(arch.removeprefix("gfx"), 16) if isinstance(arch, str) else arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def compiled_for(chip: int | str) -> Iterator[list[Any]]:
    """Compiles every launch in the block and yields the list of compiled kernels.

    `chip`: a compute capability, as 90, or an AMD chip with waves of 64 threads, as "gfx942".
    """
    kernels: list[Any] = []
    driver, stock_wave = _Driver(chip), ops.wave
    stock_run, active = JITFunction.run, triton.runtime.driver._active

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel.result() if hasattr(kernel, "result") else kernel)

    triton.runtime.driver.set_active(driver)
    ops.wave = lambda device: driver.target.warp_size
    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run, triton.runtime.driver._active, ops.wave = stock_run, active, stock_wave


def binary(kernel: Any) -> Binary:
    """The machine code of a kernel out of `compiled_for`."""
    (code,) = binaries(kernel.asm["cubin"]).values()
    return code
