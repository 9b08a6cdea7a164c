"""A program run with each instruction set of the CPU kernels."""

from __future__ import annotations

import os
import subprocess
import sys

NAMES = ("baseline", "avx2", "avx512", "avx512bf16")


def printed_by_each(program: str) -> dict[str, str]:
    """What the text of a Python program prints with each; one that fails raises."""
    return {
        isa: subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "FASTFT_CPU_ISA": isa},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for isa in NAMES
    }
