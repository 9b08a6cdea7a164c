"""Compiles Triton kernels for GPUs that are not there, and reads from the machine code what became of them.

with compiled_for(90) as launches:
    wrapper(...)  # any Python that launches Triton kernels, with tensors of the device "meta"
binary(launches[0]).spills
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from fastft import ops

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)


class _Driver(DriverBase):
    """What Triton asks of a driver to compile and nothing more."""

    def __init__(self, chip: int | str) -> None:
        amd = isinstance(chip, str)
        self.target = GPUTarget("hip", chip, 64) if amd else GPUTarget("cuda", chip, 32)
        shared = 65_536 if amd else 166_912 if chip == 80 else 232_448
        limits = {"max_shared_mem": shared, "max_num_regs": 65_536, "warpSize": self.target.warp_size}
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


@dataclass
class Binary:
    """Facts about a kernel's machine code: registers of a thread, bytes of stack, the count of each instruction."""

    registers: int
    stack: int
    instructions: Counter[str]

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] in ("LDL", "STL"))

    @property
    def atomics(self) -> int:
        """Atomic operations on global memory."""
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] in ("RED", "ATOM", "ATOMG"))

    def widths(self, kind: str) -> Counter[int]:
        """How many loads ("LDG") or stores ("STG") there are of each width in bits."""
        widths: Counter[int] = Counter()
        for name, n in self.instructions.items():
            first, *rest = name.split(".")
            if first == kind:
                sizes = [
                    int(part.lstrip("US")) for part in rest if part.lstrip("US") in ("8", "16", "64", "128", "256")
                ]
                widths[sizes[0] if sizes else 32] += n
        return widths


def binary(kernel: Any) -> Binary:
    """Disassembles with the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def output(tool: str, option: str) -> str:
            command = [_TOOLS / tool, option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = dict(re.findall(r"([A-Z]+):(\d+)", output("cuobjdump", "--dump-resource-usage")))
        code = output("nvdisasm", "-c")
    return Binary(int(usage["REG"]), int(usage["STACK"]), Counter(_INSTRUCTION.findall(code)))
