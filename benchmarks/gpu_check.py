"""What only a GPU can show: builds against the torch of this Python, runs the tests marked gpu, then the benchmarks.

make gpu-check PYTHON=python3

Needs no network and makes no environment; rivals that are importable are measured too. Writes results/<gpu>.json, .md
and .png and prints the table last. The exit status is 1 where a test failed; what was measured is kept all the same.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RIVALS = ("liger_kernel", "bitsandbytes", "torchao", "trl")
SECONDS = {"build": 120, "tests": 200, "benchmarks": 260}  # under ten minutes in all


def step(name: str, *command: str) -> bool:
    print(f"\n{name}: {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=SECONDS[name]).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{name}: not finished after {SECONDS[name]} s")
        return False


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for package in ("triton", *RIVALS, "pytest", "pytest_benchmark"):
        print(f"  {package}: {'importable' if importlib.util.find_spec(package) else 'not importable'}")
    python = sys.executable
    if not step("build", python, "setup.py", "build_ext", "--inplace"):
        raise SystemExit("the build failed")
    tested = step("tests", python, "-m", "pytest", "-q", "-m", "gpu", "tests")
    machine = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    measured = step("benchmarks", python, "benchmarks/record.py", "--machine", machine)
    if not (tested and measured):
        raise SystemExit(f"tests {'passed' if tested else 'FAILED'}, benchmarks {'done' if measured else 'FAILED'}")


if __name__ == "__main__":
    main()
