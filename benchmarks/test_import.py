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
print(between - began, time.perf_counter() - between, int("transformers" in sys.modules))
"""


def test_import(benchmark, small):
    on_top = [0.0]

    def imported() -> float:
        ran = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
        )
        of_torch, on_top[0], transformers = map(float, ran.stdout.split())
        assert not transformers
        return of_torch

    benchmark.pedantic(imported)
    if not small:
        runs = {"torch": imported, "ours": lambda: on_top[0]}  # of the same process
        keep(benchmark.extra_info, {"torch": turns.by_turns(runs)})
        print(f"\n{benchmark.name}: {benchmark.extra_info}")
