"""The CPU library on another architecture: what setup.py compiles for aarch64 gives x86's bits.

The library runs under qemu in a program without torch (support/kernel_digests.cpp), which prints a
digest of the bits of every result. exp and tanh are the kernels' own; of libm they call expm1 and
log1p in float64, whose last bit may differ between machines, but not what is left of it in float32.
"""

from __future__ import annotations

import functools
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from fastft import _native

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "tests" / "support" / "kernel_digests.cpp"
SYSROOT = Path("/usr/aarch64-linux-gnu")  # of Debian's cross compiler


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def program(folder: Path, cxx: str) -> tuple[Path, Path]:
    """Builds the CPU library as setup.py does with a compiler, and the program that runs it.

    Returns:
        The program and the folder of its libraries.
    """
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "fastft").mkdir()
    shutil.copy(ROOT / "fastft" / "__init__.py", folder / "fastft")
    build = {"CXX": cxx, "FASTFT_BUILD_CPU": "1", "FASTFT_BUILD_CUDA": "0"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **build},
        capture_output=True,
        check=True,
    )
    libraries, driver = folder / "build" / "native" / "cpu", folder / "driver"
    compile_driver = [cxx, "-std=c++17", "-O1", f"-I{folder / 'csrc' / 'include'}", str(DRIVER)]
    link = [
        "-pthread",
        "-rdynamic",
        f"-L{libraries}",
        "-lfastft_cpu",
        f"-Wl,-rpath-link,{libraries}",
    ]
    run([*compile_driver, *link, "-o", str(driver)])
    return driver, libraries


@functools.cache
def missing() -> str | None:
    """Why the library cannot be built and run for aarch64 here; None if it can."""
    tools = ("g++", "aarch64-linux-gnu-g++", "qemu-aarch64")
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)} (apt install g++ g++-aarch64-linux-gnu qemu-user)"
    return None if platform.machine() == "x86_64" else "this processor is no x86-64"


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_aarch64_and_every_instruction_set_give_the_same_bits(tmp_path: Path) -> None:
    driver, libraries = program(tmp_path / "x86", "g++")
    sets = _native._INSTRUCTION_SETS
    digests = {
        isa: run([str(driver)], LD_LIBRARY_PATH=str(libraries), FASTFT_CPU_ISA=isa) for isa in sets
    }
    driver, libraries = program(tmp_path / "aarch64", "aarch64-linux-gnu-g++")
    objects = {path.name for path in libraries.glob("*_kernel_*.o")}
    assert objects and all(name.endswith("_baseline.o") for name in objects)
    emulated = ["qemu-aarch64", "-L", str(SYSROOT), "-E", f"LD_LIBRARY_PATH={libraries}"]
    digests["aarch64"] = run([*emulated, str(driver)])
    baseline = digests["baseline"].splitlines()
    assert len(baseline) > 50 and len({line.partition(": ")[2] for line in baseline}) > 45
    for name, printed in digests.items():
        assert printed.splitlines() == baseline, name


COMPILER = """#!/bin/sh
case "$*" in *-dM*) echo '#define {macro} 1' ;; *) exit 1 ;; esac
"""


@pytest.mark.parametrize(
    ("macro", "sets"),
    [
        ("__x86_64__", set(_native._INSTRUCTION_SETS)),
        ("__aarch64__", {"baseline"}),
        ("__riscv", {"baseline"}),
    ],
)
def test_the_compiler_says_for_which_instruction_sets_kernels_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, macro: str, sets: set[str]
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(macro=macro))
    compiler.chmod(0o755)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    rooms = runpy.run_path(str(ROOT / "setup.py"))
    names = [name for _, name, _ in rooms["cpu_objects"]([str(compiler)])]
    kernels = {name.removesuffix(".o").partition("_kernel_")[2] for name in names} - {""}
    assert kernels == sets and "adamw_kernel_baseline.o" in names
