"""Reads what became of a kernel from its machine code: registers, spills, widths of accesses, how
many warps fit.

The disassemblers are those of Triton's wheel, because there are installations of nvcc without them.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

RESERVED = 1024  # bytes of shared memory that the driver takes of each block
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE
)
_USAGE = re.compile(r"^ Function (\S+):\n\s+(.*)$", re.MULTILINE)
_SHARED_OF_CHIP = {80: 167_936, 90: 233_472, 100: 233_472}
_WARPS_OF_CHIP, _BLOCKS_OF_CHIP, _REGISTERS_OF_CHIP = 64, 32, 65_536


@dataclass
class Binary:
    """Facts about a kernel's machine code.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        instructions: how often each one stands in the code.
    """

    registers: int
    stack: int
    instructions: Counter[str]

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return self._count("LDL", "STL")

    @property
    def atomics(self) -> int:
        """Atomic operations on global memory."""
        return self._count("RED", "ATOM", "ATOMG")

    @property
    def loads(self) -> Counter[int]:
        """How many loads from global memory there are of each width in bits; also of addresses of
        any memory."""
        return self.widths("LDG") + self.widths("LD")

    @property
    def stores(self) -> Counter[int]:
        """The same of stores."""
        return self.widths("STG") + self.widths("ST")

    def widths(self, kind: str) -> Counter[int]:
        """How many accesses of a kind (`"LDG"`, `"STG"`) there are of each width in bits."""
        widths: Counter[int] = Counter()
        for name, n in self.instructions.items():
            first, *rest = name.split(".")
            if first == kind:
                sizes = [
                    int(part.lstrip("US"))
                    for part in rest
                    if part.lstrip("US") in ("8", "16", "64", "128", "256")
                ]
                widths[sizes[0] if sizes else 32] += n
        return widths

    def warps(self, chip: int, threads: int, shared: int) -> int:
        """How many warps an SM of sm_<chip> holds at once, in blocks of `threads` that have so much
        shared memory."""
        of_block = -(-threads // 32)
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = _REGISTERS_OF_CHIP // of_warp // 4 * 4 // of_block  # an SM has four parts
        by_shared = _SHARED_OF_CHIP[chip] // (-(-(shared + RESERVED) // 128) * 128)
        fits = (by_registers, by_shared, _WARPS_OF_CHIP // of_block, _BLOCKS_OF_CHIP)
        return min(fits) * of_block

    def _count(self, *kinds: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] in kinds)


@functools.cache
def nvcc_version() -> str:
    """As "13.0.88"."""
    printed = subprocess.run(
        ["nvcc", "--version"], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"\bV([\d.]+)", printed)
    assert found, printed
    return found[1]


def binaries(cubin: bytes | Path) -> dict[str, Binary]:
    """The kernels of a cubin, by their mangled names."""
    if isinstance(cubin, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return binaries(Path(file.name))
    usages = _USAGE.findall(_output("cuobjdump", "--dump-resource-usage", cubin))
    sections = re.split(
        r"^\s*\.section\s+\.text\.(\S+?),.*$", _output("nvdisasm", "-c", cubin), flags=re.MULTILINE
    )
    code = dict(zip(sections[1::2], sections[2::2], strict=True))
    found = {}
    for name, usage in usages:
        numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
        found[name] = Binary(
            numbers["REG"], numbers["STACK"], Counter(_INSTRUCTION.findall(code[name]))
        )
    return found


def assembled(source: Path, chip: int, folder: Path) -> Path:
    """The cubin of a CUDA source, or of PTX, for sm_<chip>, in `folder`."""
    cubin = folder / f"{source.stem}.{chip}.cubin"
    flags = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{chip}"]
    subprocess.run(
        ["nvcc", *flags, source, "-o", cubin], check=True, capture_output=True, text=True
    )
    return cubin


def _output(tool: str, option: str, cubin: Path) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, option, cubin], check=True, capture_output=True, text=True).stdout
