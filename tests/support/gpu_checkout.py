"""A checkout in which `make gpu-check` can be rehearsed: its own code, a stub of torch, and short
parts that go wrong.

The stub has of torch what the check asks a GPU's torch for: a device of compute capability 9.0 with
a name, and events by a clock. The parts are a build that notes its architecture, and tests,
benchmarks and trainings of a few lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
REAL = "bounded compare conftest goals gpu_check gpu_report ledger machine one_by_one".split()
REAL += ["pytest_ledger", "tables", "turns"]
GPU = "stub-h100-80gb"

TORCH = """
    import time
    from types import SimpleNamespace as Names

    __version__, int8, version = "2.11.0+stub", "int8", Names(cuda="13.0")
    NOW = [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = None
        def record(self):
            self.at = NOW[0]
        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Tensor:
        def zero_(self):
            NOW[0] += 1e-4

    def empty(*shape, **options):
        return Tensor()

    def get_num_threads():
        return 1

    spoilt = []  # by an illegal memory access

    def synchronize():
        if spoilt:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cuda = Names(
        Event=Event, is_available=lambda: True, is_initialized=lambda: True,
        synchronize=synchronize, empty_cache=synchronize,
        get_device_capability=lambda index: (9, 0),
        get_device_properties=lambda index: Names(name="Stub H100 80GB", total_memory=80 * 2**30),
    )
"""
SETUP = """
    import json, os, pathlib
    print("built for", os.environ["FASTFT_CUDA_ARCHS"])
    folder = pathlib.Path("fastft/_lib")
    folder.mkdir(parents=True, exist_ok=True)
    built = {"cpu": {"sha256": ""}, "cuda": {"sha256": ""}}
    (folder / "build_info.json").write_text(json.dumps(built))
"""
SMOKE = """
    import os
    def test_first(record_property):
        kernel = "cuda, cross-entropy, plain, bf16, V=128256"
        record_property("found", {"kernel": kernel, "ms": 1.5})
    def test_that_crashes():
        os._exit(11)
    def test_last(record_property):
        record_property("found", {"kernel": "cuda, AdamW, exact, moments fp32", "ms": 7.0})
"""
GPU_TESTS = """
    import pytest
    pytestmark = pytest.mark.gpu
    @pytest.mark.parametrize("n", range(4))
    def test_quick(n):
        assert n != 2, "two is wrong"
    @pytest.mark.xdist_group("last")
    def test_that_hangs():
        CHILD
"""
BENCHMARKS = """
    import torch
    from compare import compare
    def run():
        torch.NOW[0] += 2e-3
    def test_right(benchmark):
        compare(benchmark, run, {"rival": lambda: (run(), run())}, check=run)
    def test_wrong(benchmark):
        benchmark.extra_info["peak_mib"] = {"ours": 5.0}
        raise RuntimeError("out of memory")
    def test_that_spoils_the_context(benchmark):
        torch.spoilt.append(True)
        torch.cuda.synchronize()
    def test_that_hangs(benchmark):
        torch.cuda.synchronize()
        CHILD
    def test_after_all(benchmark):
        compare(benchmark, run, {}, check=run)
"""
TRAINING = """
    import argparse, pathlib, time
    from ledger import Ledger
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant")
    parser.add_argument("--ledger", type=pathlib.Path)
    options = parser.parse_args()
    line = {"part": "train", "case": f"training[{options.variant}]"}
    ledger = Ledger(options.ledger)
    ledger.append(**line, outcome="begun")
    if options.variant == "fastft":
        CHILD
    found = {"losses": [3.0, 2.0], "tokens_per_second": 9.0, "peak_mib": 1.0}
    ledger.append(**line, outcome="passed", seconds=0.1, found=found)
"""
OFFLOADING = """
    import argparse, pathlib
    from ledger import Ledger
    parser = argparse.ArgumentParser()
    parser.add_argument("--ledger", type=pathlib.Path)
    ledger = Ledger(parser.parse_args().ledger)
    line = {"part": "train", "case": "training[8B under 24 GiB]"}
    ledger.append(**line, outcome="skipped", said="the host has 1 GiB available")
"""
# runs the command behind its options; it has something to report of races
COMPUTE_SANITIZER = """#!/bin/sh
    tool=$1
    case "$PYTORCH_NO_CUDA_MEMORY_CACHING $2" in "1 --error-exitcode="*) ;; *) exit 3 ;; esac
    while case "$1" in --*) ;; *) false ;; esac; do shift; done
    "$@" || exit
    case $tool in --tool=racecheck) echo "Race reported" >&2; exit 86 ;; esac
"""
# starts a process that outlives who started it, and waits for it
CHILD = "import subprocess; subprocess.run(['sh', '-c', 'echo $$ >> children; exec sleep 300'])"


class Ran(NamedTuple):
    status: int
    seconds: float
    printed: str


class Checkout:
    """One in `folder`; `goes_wrong`: parts hang, crash and fail, else they pass."""

    def __init__(self, folder: Path, *, goes_wrong: bool) -> None:
        self.folder, self.results = folder, folder / "benchmarks" / "results"
        for name in REAL:
            self.put(f"benchmarks/{name}.py", (ROOT / "benchmarks" / f"{name}.py").read_text())
        child = CHILD if goes_wrong else "pass"
        texts = {"stub/torch/__init__": TORCH, "setup": SETUP, "benchmarks/training": TRAINING}
        texts |= {"benchmarks/offloading": OFFLOADING, "benchmarks/launches": "print('launched')"}
        texts |= {
            "benchmarks/test_smoke": SMOKE if goes_wrong else SMOKE.replace("os._exit(11)", "pass")
        }
        texts |= {"benchmarks/test_adamw": BENCHMARKS} if goes_wrong else {}
        for (
            stem
        ) in "cross_entropy linear_cross_entropy linear_log_probs attention boundaries".split():
            texts[f"benchmarks/test_{stem}"] = (
                "import no_such_module" if stem == "attention" and goes_wrong else ""
            )
        texts |= {} if goes_wrong else {"benchmarks/test_adamw": ""}
        texts |= {
            "tests/test_kernels": GPU_TESTS if goes_wrong else GPU_TESTS.replace("n != 2", "True")
        }
        texts |= {"tests/test_of_the_cpu": "import no_such_module"}
        for stem, text in texts.items():
            self.put(f"{stem}.py", textwrap.dedent(text).replace("CHILD", child))
        self.put(
            "pytest.ini", "[pytest]\naddopts = --strict-markers\nmarkers =\n  gpu\n  xdist_group\n"
        )
        self.results.mkdir()

    def put(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.folder / "benchmarks" / "gpu_check.py"), *arguments]

    def environment(self, out: Path | None) -> dict[str, str]:
        """No PATH but the shell's, so no git, nvcc or nvidia-smi; nothing of a pytest around this
        one."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "FASTFT_"))
        }
        tools = self.folder / "tools"
        tools.mkdir(exist_ok=True)
        for tool in ("sh", "sleep"):
            if not (tools / tool).exists():
                (tools / tool).symlink_to(shutil.which(tool))
        kept |= {"PATH": str(tools), "PYTHONPATH": str(self.folder / "stub")}
        # half of the time that pytest takes to start
        kept |= {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "-p xdist -p pytest_benchmark.plugin",
        }
        kept.pop("OUT", None)
        return kept | ({"OUT": str(out)} if out else {})

    def check(self, *arguments: str, out: Path | None = None, behind: bool = False) -> Ran:
        """`behind`: as under nohup, or behind a shell's &, which ignore Ctrl-C."""
        began, interrupt = (
            time.monotonic(),
            signal.SIG_IGN if behind else signal.default_int_handler,
        )
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment(out),
            preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt),
        )
        return Ran(done.returncode, time.monotonic() - began, done.stdout + done.stderr)

    def children(self) -> list[int]:
        """The processes that hanging parts have started."""
        path = self.folder / "children"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lives(process: int) -> bool:
    """Whether a process is still there a little later: who is killed takes a moment to be gone."""
    stat = Path(f"/proc/{process}/stat")
    for _ in range(100):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return False
    return True
