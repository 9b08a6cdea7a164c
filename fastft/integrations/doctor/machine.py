"""What `python -m fastft doctor` says of a machine: torch's build, threads, kernels, versions.

A check gets a `Machine`, which holds every fact that one of them looks at.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastft import _native
from fastft.integrations.doctor.finding import Finding
from fastft.loss.head_gemms import is_emulated
from fastft.ops import triton_missing

# the oldest version of each that fastft's tests run with (pyproject.toml)
OLDEST = {"torch": (2, 10), "transformers": (5, 17), "accelerate": (1, 10), "datasets": (3, 0)}


@dataclass(frozen=True)
class Machine:
    """The facts.

    Attributes:
        torch: its version.
        gpu_build: whether torch was built for CUDA or ROCm.
        gpu: whether torch can use such a GPU.
        nvidia: whether NVIDIA's driver is loaded here.
        cores: how many CPU cores this process may use; of several that torchrun has started here,
            its share.
        threads: how many threads torch computes with.
        omp: OMP_NUM_THREADS, or None.
        emulated: whether products of bf16 are emulated on the CPU.
        compiler: the C compiler that Triton would find, or None.
        missing: of each native library, why it is not loaded, or None.
        triton: why no kernel of Triton can run, or None.
        versions: of the packages in `OLDEST` which are installed.
        hidden: whether CUDA_VISIBLE_DEVICES hides the GPUs.
    """

    torch: str
    gpu_build: bool
    gpu: bool
    nvidia: bool
    cores: int
    threads: int
    omp: str | None
    emulated: bool
    compiler: str | None
    missing: Mapping[str, str | None]
    triton: str | None
    versions: Mapping[str, str]
    hidden: bool = False

    def __str__(self) -> str:
        gpu = "a GPU" if self.gpu else "no GPU that torch can use"
        return f"torch {self.torch}, {self.threads} threads on {self.cores} cores, {gpu}"


def this_machine() -> Machine:
    """The machine of this process, as it is now."""
    return Machine(
        torch=torch.__version__,
        gpu_build=bool(torch.version.cuda or torch.version.hip),
        gpu=torch.cuda.is_available(),
        nvidia=Path("/proc/driver/nvidia/version").exists(),
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        omp=os.environ.get("OMP_NUM_THREADS"),
        emulated=is_emulated(torch.bfloat16, "cpu"),
        compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        missing={kind: _native.missing(kind) for kind in ("cpu", "cuda")},
        triton=triton_missing(),
        versions=_versions(),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
    )


def slowness(dtype: torch.dtype, size: int = 512) -> float:
    """How many times longer a matrix product takes on this CPU than in fp32, measured now."""
    seconds = []
    for each in (torch.float32, dtype):
        factor = torch.ones(size, size, dtype=each)
        factor @ factor  # the first call loads what it needs
        begin = time.perf_counter()
        factor @ factor
        seconds.append(time.perf_counter() - begin)
    return seconds[1] / seconds[0]


def torch_without_the_gpu(machine: Machine) -> Finding | None:
    """torch is a CPU build, or its CUDA does not start, beside an NVIDIA GPU."""
    if not machine.nvidia or machine.gpu or machine.hidden:
        return None
    build = "cannot use it" if machine.gpu_build else "is a build for the CPU alone"
    return Finding(
        "slow",
        f"This machine has an NVIDIA GPU, and torch {machine.torch} {build}.",
        "Everything is trained on the CPU.",
        "Install a driver that is as new as torch's CUDA, or a torch for this driver."
        if machine.gpu_build
        else "Install torch with CUDA: https://pytorch.org/get-started/locally.",
    )


def kernels_not_loaded(machine: Machine) -> Finding | None:
    """A native library of fastft is missing where it would compute."""
    kind = "cuda" if machine.gpu else "cpu"
    reason = machine.missing[kind]
    if reason is None or "FASTFT_DISABLE" in reason or sys.platform != "linux":
        return None
    if kind == "cuda" and machine.triton is None:
        return None  # Triton's kernels compute
    return Finding(
        "slow",
        f"fastft's kernels for {kind} are not loaded: {reason}.",
        "Its losses and its AdamW compute in plain torch: the same results, later.",
        "Install a wheel, or `pip install .` with a C++ compiler (and nvcc, for a GPU).",
    )


def no_compiler_for_triton(machine: Machine) -> Finding | None:
    """Triton cannot build its launchers on a machine with a GPU."""
    if not machine.gpu or machine.triton is not None or machine.compiler is not None:
        return None
    return Finding(
        "note",
        "There is no C compiler (gcc, clang or $CC).",
        "Triton builds a launcher for each kernel: torch.compile and kernels of Triton raise.",
        "Install gcc.",
    )


def threads_and_cores(machine: Machine) -> Finding | None:
    """torch computes with more threads than there are cores, or with one of several."""
    if machine.threads > machine.cores:
        return Finding(
            "slow",
            f"torch computes with {machine.threads} threads on {machine.cores} cores.",
            "The threads of each operation wait for one another.",
            f"Set OMP_NUM_THREADS={machine.cores}.",
        )
    if machine.threads == 1 < machine.cores and not machine.gpu:
        source = "" if machine.omp is None else f" (OMP_NUM_THREADS={machine.omp})"
        return Finding(
            "slow",
            f"torch computes with one thread of {machine.cores} cores{source}.",
            "A training on the CPU leaves the other cores idle; torchrun sets this by itself.",
            f"Set OMP_NUM_THREADS={machine.cores}.",
        )
    return None


def bf16_is_emulated(machine: Machine) -> Finding | None:
    """The processor has no instructions for products of bf16, and there is no GPU."""
    if machine.gpu or not machine.emulated:
        return None
    times = slowness(torch.bfloat16)
    return Finding(
        "note",
        "This processor has no instructions for products of bf16.",
        f"A product of matrices takes {times:.1f} times as long in bf16 as in fp32 (measured now).",
        "Train in fp32 on this CPU: neither bf16=True nor a bf16 model.",
    )


def versions_never_tested(machine: Machine) -> Finding | None:
    """A package is older than what fastft promises to work with."""
    old = [
        f"{package} {machine.versions[package]} (needs {'.'.join(map(str, least))})"
        for package, least in OLDEST.items()
        if package in machine.versions and _release(machine.versions[package]) < least
    ]
    if not old:
        return None
    return Finding(
        "wrong",
        f"Too old for fastft: {', '.join(old)}.",
        "Nobody has tested fastft with them, and names that it uses may be missing.",
        "pip install --upgrade them.",
    )


MACHINE = (
    torch_without_the_gpu,
    kernels_not_loaded,
    no_compiler_for_triton,
    threads_and_cores,
    bf16_is_emulated,
    versions_never_tested,
)


def _usable_cores() -> int:
    """This process's share of the cores of its affinity, or of its control group's quota."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    quota = _quota()
    cores = cores if quota is None else min(cores, round(quota))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores a container may use; None without a limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        paths = [root / file for file in files]
        if all(path.exists() for path in paths):
            quota, period = " ".join(path.read_text() for path in paths).split()
            unlimited = quota in ("max", "-1")
            return None if unlimited else int(quota) / int(period)
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version + ".0")[:2]
    return int(major), int(minor)


def _versions() -> dict[str, str]:
    installed = {}
    for package in OLDEST:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
