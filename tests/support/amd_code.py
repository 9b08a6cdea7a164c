"""What became of a Triton kernel for an AMD chip that is not there (`compiled_for("gfx942")`)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

# what no AMD chip has, though the compiler might hand it on: PTX inline, NVIDIA's intrinsics and
# its mathematics
_OF_CUDA = re.compile(r"llvm\.nvvm|__nv_\w+|inline_asm|\basm sideeffect|libdevice")


@dataclass
class AmdCode:
    """Facts about a kernel: threads of a wave, spilled registers, bytes of scratch memory, its
    instructions."""

    wave: int
    vector_spills: int
    scalar_spills: int
    scratch: int
    instructions: Counter[str]
    of_cuda: set[str]

    def widths(self, kind: str) -> set[int]:
        """The widths in bits of its "load"s or "store"s."""
        sizes = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}
        sizes |= {f"dword{n}": 32 * int(n[1:] or 1) for n in ("", "x2", "x3", "x4")}
        found = (
            re.match(rf"(?:buffer|global)_{kind}_(\w+?)(?:_d16\w*)?$", name)
            for name in self.instructions
        )
        return {sizes[match[1]] for match in found if match}


def of_cuda(kernel: Any) -> set[str]:
    """What a kernel, compiled for any chip, has that no AMD chip does."""
    forms = (kernel.asm[form] for form in ("ttir", "ttgir", "llir"))
    return {found for text in forms for found in _OF_CUDA.findall(text)}


def amd_code(kernel: Any) -> AmdCode:
    """Reads the assembly and its notes."""
    assembly = kernel.asm["amdgcn"]

    def note(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # type: ignore[index]

    return AmdCode(
        note("wavefront_size"),
        note("vgpr_spill_count"),
        note("sgpr_spill_count"),
        note("private_segment_fixed_size"),
        Counter(re.findall(r"^\s+([a-z]\w+)", assembly, re.MULTILINE)),
        of_cuda(kernel),
    )
