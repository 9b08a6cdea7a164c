"""The native libraries: what they need, what they export, and that a broken one never breaks the import."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastft
from fastft import _native

PACKAGE = Path(fastft.__file__).parent
CSRC = PACKAGE.parent / "csrc"
LIBRARIES = sorted((PACKAGE / "_lib").glob("libfastft_*.so"))
needs_cpu_library = pytest.mark.skipif(_native.missing("cpu") is not None, reason="no native CPU library")

REPORT = [sys.executable, "-m", "fastft"]


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "fastft", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def report(folder: Path, **environment: str) -> str:
    done = subprocess.run(
        REPORT, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def foreign(path: Path) -> None:
    source = path.with_suffix(".c")
    source.write_text("int nothing;")
    subprocess.run(["gcc", "-shared", "-o", str(path), str(source)], check=True)
    record = path.parent / "build_info.json"
    record.write_text(json.dumps({"cpu": {"bytes": path.stat().st_size}}))


@needs_cpu_library
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "is damaged"),
        (garble, "OSError"),
        (foreign, "fastft_register"),
        (lambda path: path.unlink(), "not built"),
        (lambda path: (path.parent / "build_info.json").write_text("{"), "JSONDecodeError"),
        (lambda path: (path.parent / "build_info.json").unlink(), "is damaged"),
    ],
    ids=["truncated", "garbled", "foreign", "missing", "bad record", "no record"],
)
def test_a_broken_library_is_no_import_error(copied_package: Path, damage, reason: str) -> None:
    damage(copied_package / "fastft" / "_lib" / "libfastft_cpu.so")
    printed = report(copied_package)
    assert re.search(rf"libfastft_cpu: .*{reason}", printed), printed
    assert re.search(r"adamw_ +eager", printed), printed


@needs_cpu_library
def test_libraries_can_be_disabled(copied_package: Path) -> None:
    assert "libfastft_cpu: disabled by FASTFT_DISABLE" in report(copied_package, FASTFT_DISABLE="cpu")


@needs_cpu_library
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_instruction_set_can_be_capped(copied_package: Path, isa: str) -> None:
    if isa == "avx2" and _native.cpu_isa() == "baseline":
        pytest.skip("this processor has no AVX2")
    assert f"kernels for {isa}" in report(copied_package, FASTFT_CPU_ISA=isa)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_shim_declarations_are_torchs(tmp_path: Path) -> None:
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip("this torch ships no C shim headers")
    both = tmp_path / "both.cpp"
    both.write_text(
        "#define USE_CUDA\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include <torch/csrc/stable/c/shim.h>\n"
        '#define FASTFT_SHIM_DECLARATIONS_ONLY\n#include "shim.h"\n'
    )
    includes = [f"-I{headers}", f"-I{CSRC / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    done = subprocess.run(["g++", "-std=c++17", "-fsyntax-only", *includes, str(both)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def symbols(library: Path, *flags: str) -> set[str]:
    listing = subprocess.run(["nm", "-D", *flags, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines()}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
class TestLinkage:
    def test_exports_only_fastft(self, library: Path) -> None:
        assert {name for name in symbols(library, "--defined-only") if not name.startswith("fastft_")} == set()

    def test_needs_only_declared_symbols_of_torch(self, library: Path) -> None:
        declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", (CSRC / "include/shim.h").read_text()))
        needed = {name for name in symbols(library, "--undefined-only") if "torch" in name}
        assert needed and needed <= declared

    def test_carries_no_openmp(self, library: Path) -> None:
        assert not {name for name in symbols(library, "--undefined-only") if name.startswith(("omp_", "GOMP_"))}
