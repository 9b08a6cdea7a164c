"""What was measured on: the machine, its GPU, the versions. Whatever cannot be found out is None,
or says why.

python benchmarks/machine.py [--to FILE | --name]    prints it as JSON, or writes it
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RIVALS = {
    "liger_kernel": "liger-kernel",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "trl": "trl",
}
PACKAGES = {
    "triton": "triton",
    "transformers": "transformers",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
}
PACKAGES |= {"pytest_benchmark": "pytest-benchmark", **RIVALS}


# who sets these measures the kernels of ours and of torch with fewer instructions
LIMITS = ("FASTFT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def name(described: dict[str, Any]) -> str:
    """The folder of a machine's results: its GPU, or its processor with the instruction set, and
    that to which it was limited."""
    if "gpu" in described:
        return slug(described["gpu"])
    whole, used = described["processor_isa"], described["cpu_isa"]
    limited = f"-as-{used}" if used != whole else ""
    return f"{slug(described['cpu'].partition(',')[0])}-{whole}{limited}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def facts() -> dict[str, Any]:
    """Of a GPU also its architecture (as nvcc calls it, "90"), memory and driver."""
    described: dict[str, Any] = {"commit": commit(), "sources": sources()} | _fastft()
    described |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    described |= {"cpu": cpu_name(), "processor_isa": processor_isa()}
    limits = {name: os.environ[name] for name in LIMITS if name in os.environ}
    described |= {"limited": limits} if limits else {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "cuda": torch.version.cuda,
            "driver": _printed("nvidia-smi", *_DRIVER),
        }
        described |= {"architecture": "".join(map(str, torch.cuda.get_device_capability(0)))}
        described |= {"memory_gib": round(properties.total_memory / 2**30, 1)}
        described |= {"nvcc": _printed("nvcc", "--version", last=True)}
    return described | {
        "packages": {name: version(name, package) for name, package in PACKAGES.items()}
    }


_DRIVER = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


# what a measurement writes itself, and the pages that are made of it
_WRITTEN = (":(exclude)benchmarks/results", ":(exclude)docs", ":(exclude)*.md")


def commit() -> str | None:
    """The commit, with "-dirty" where files differ from it that a measurement does not write."""
    described = _printed("git", "describe", "--always")
    changed = _printed("git", "status", "--porcelain", "--untracked-files=no", ".", *_WRITTEN)
    return f"{described}-dirty" if described and changed else described


def sources() -> str:
    """Tells one copy of the sources from another where there is no git."""
    digest = hashlib.sha256()
    for path in sorted(
        [*ROOT.glob("fastft/**/*.py"), *ROOT.glob("csrc/**/*.[chu]*"), ROOT / "setup.py"]
    ):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:12]


def version(module: str, package: str) -> str | None:
    """Of a package that can be imported; None where there is none."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.exists() else ""
    names = [
        line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")
    ]
    return (
        f"{names[0]}, {len(names)} cores"
        if names
        else f"{platform.processor()}, {os.cpu_count()} cores"
    )


def processor_isa() -> str:
    """The best set of instructions that the processor has and our kernels know (csrc/cpu/isa.h)."""
    listing = Path("/proc/cpuinfo")
    flags = set(listing.read_text().split()) if listing.exists() else set()
    known = {"avx512bf16": "avx512_bf16", "avx512": "avx512vl", "avx2": "avx2"}
    return next((isa for isa, flag in known.items() if flag in flags), "baseline")


def _fastft() -> dict[str, Any]:
    try:
        import fastft
        from fastft import _native

        return {"fastft": fastft.__version__, "cpu_isa": _native.cpu_isa()}
    except (
        Exception
    ) as error:  # what is measured says so too; the machine's name must not be lost for it
        return {"fastft": f"cannot be imported: {type(error).__name__}: {error}"}


def _printed(*command: str, last: bool = False) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return None if done.returncode or not lines else lines[-1 if last else 0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, help="the file that is written")
    parser.add_argument("--name", help="the folder of its results alone", action="store_true")
    options = parser.parse_args()
    if options.name:
        print(name(facts()))
        return
    text = json.dumps(facts(), indent=1)
    if options.to is None:
        print(text)
    else:
        options.to.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
