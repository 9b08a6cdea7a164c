"""What `import fastft` takes on top of `import torch`, in processes by turns."""

from __future__ import annotations

import subprocess
import sys

import turns
from compare import keep

IMPORTS = """
import sys, time
began = time.perf_counter()
import torch
between = time.perf_counter()
import fastft
print(between - began, time.perf_counter() - between, "transformers" in sys.modules)
"""


def test_import(benchmark, small):
    def imported(which: int) -> float:
        ran = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
        )
        *seconds, transformers = ran.stdout.split()
        assert transformers == "False"
        return float(seconds[which])

    benchmark.pedantic(lambda: imported(1))
    if not small:
        runs = {"ours": lambda: imported(1), "torch": lambda: imported(0)}
        keep(benchmark.extra_info, {"torch": turns.by_turns(runs)})
        print(f"\n{benchmark.name}: {benchmark.extra_info}")
