"""Installing fastft as a user does: with and without compilers, from a wheel, on other Pythons."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools
import torch

import fastft

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "fastft")
OTHER_PYTHONS = ("3.10", "3.12", "3.13")

pytestmark = pytest.mark.build


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a user checks out, with nothing built."""
    folder = tmp_path / "checkout"
    for name in SOURCES:
        source, copy = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("_lib", "__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    return folder


def wheel(checkout: Path, **environment: str) -> Path:
    """Builds a wheel without isolation, so that the environment's setuptools and ninja are used."""
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", "dist"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next((checkout / "dist").glob("*.whl"))


def test_the_source_distribution_builds_what_a_checkout_builds(checkout: Path) -> None:
    """Nothing is left out: a wheel of the sdist has the library, and the version of the package."""
    script = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    unpacked = checkout / "unpacked"
    shutil.unpack_archive(archive, unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    assert folder.name == f"fastft-{fastft.__version__}"
    listed = [
        {path.relative_to(root) for path in (root / "csrc").rglob("*.*") if path.stem[0] != "."}
        for root in (checkout, folder)
    ]
    assert listed[0] == listed[1]
    if shutil.which("g++"):
        assert "sha256" in build_info(wheel(folder, FASTFT_BUILD_CUDA="0"))["cpu"]


def build_info(built: Path) -> dict:
    return json.loads(zipfile.ZipFile(built).read("fastft/_lib/build_info.json"))


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with coreutils and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("mv", "sh", "uname"):
        os.symlink(shutil.which(tool), folder / tool)
    return str(folder)


def test_without_compilers(checkout: Path, bare_path: str) -> None:
    built = wheel(checkout, PATH=bare_path, CXX="", CUDA_HOME="/nonexistent")
    assert built.name.endswith("-py3-none-any.whl")
    assert "no C++ compiler found" in build_info(built)["cpu"]["missing"]
    site = checkout / "site"
    zipfile.ZipFile(built).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-m", "fastft"], cwd=site, env=environment, capture_output=True, text=True
    )
    assert "libfastft_cpu: not built: no C++ compiler found" in done.stdout, done


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_told_to_use_plain_torch(checkout: Path, system: str) -> None:
    """No compiler is called there, though there is one."""
    script = (
        f"import runpy, sys, setuptools.command.build_ext; sys.platform = {system!r}; "
        "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    info = json.loads((checkout / "fastft" / "_lib" / "build_info.json").read_text())
    assert all("the kernels are for Linux" in info[kind]["missing"] for kind in ("cpu", "cuda"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_without_nvcc(checkout: Path) -> None:
    built = wheel(checkout, CUDA_HOME="/nonexistent")
    assert "-py3-none-" in built.name and not built.name.endswith("any.whl")
    info = build_info(built)
    assert len(info["cpu"]["sha256"]) == 64 and "nvcc not found" in info["cuda"]["missing"]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_demanded_library_fails_the_build(checkout: Path, bare_path: str, kind: str) -> None:
    demand = {
        "PATH": bare_path,
        "CXX": "",
        "CUDA_HOME": "/nonexistent",
        f"FASTFT_BUILD_{kind.upper()}": "1",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, **demand}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"libfastft_{kind}.so cannot be built" in done.stderr


NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
  *--list-gpu-arch*) printf 'compute_%s\\n' {archs} ;;
  *--dryrun*) echo '#$ TOP={home}' >&2 ;;
  *) exit 1 ;;
esac
"""
KNOWN = {  # what nvcc says of itself
    "12.4": (50, 60, 70, 75, 80, 86, 87, 89, 90),
    "12.8": (50, 60, 70, 75, 80, 86, 87, 89, 90, 100, 101, 120),
    "13.0": (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121),
    "15.0": (80, 86, 89, 90, 100, 120, 130),
}


@pytest.fixture
def compile_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """How setup.py has CUDA files compiled by an nvcc of some version, which is not there and
    compiles nothing."""
    for folder in ("bin", "lib64", "build"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    for name in [name for name in os.environ if name.startswith("FASTFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    rooms = runpy.run_path(str(ROOT / "setup.py"))

    def command(version: str, **environment: str) -> str:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(
            NVCC.format(version=version, archs=" ".join(map(str, KNOWN[version])), home=tmp_path)
        )
        nvcc.chmod(0o755)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        rooms["write_rules"]("cuda", tmp_path / "build")
        rules = (tmp_path / "build" / "build.ninja").read_text().replace(" $\n", " ")
        (compiles,) = re.findall(r"^rule compile\n  command = (.*)", rules, re.MULTILINE)
        return compiles

    return command


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
class TestWhatNvccIsTold:
    @pytest.mark.parametrize(
        ("version", "built", "ptx"),
        [
            ("12.4", (75, 80, 86, 89, 90), 90),
            ("12.8", (75, 80, 86, 89, 90, 100, 120), 120),
            ("13.0", (75, 80, 86, 89, 90, 100, 120), 120),
            ("15.0", (80, 86, 89, 90, 100, 120), 120),
        ],
    )
    def test_every_chip_that_it_knows_and_ptx_of_the_newest(
        self, compile_command: Callable[..., str], version: str, built: tuple[int, ...], ptx: int
    ) -> None:
        compiles = compile_command(version)
        assert tuple(map(int, re.findall(r"\bsm_(\d+)", compiles))) == built
        assert re.findall(r"sm_\d+,compute_(\d+)", compiles) == [str(ptx)]

    @pytest.mark.parametrize(
        ("wanted", "code"),
        [
            ("90", ["sm_90"]),
            ("9.0", ["sm_90"]),
            ("80+PTX 90a", ["[sm_80,compute_80]", "sm_90a"]),
            ("80;100+PTX", ["[sm_80,compute_80]"]),
        ],
    )
    def test_the_chips_that_were_asked_for(
        self, compile_command: Callable[..., str], wanted: str, code: list[str]
    ) -> None:
        compiles = compile_command("12.4", FASTFT_CUDA_ARCHS=wanted)
        assert re.findall(r"code=([\w,\[\]]+)", compiles) == code

    def test_spills_and_warnings_are_errors_in_ci_alone(
        self, compile_command: Callable[..., str]
    ) -> None:
        assert "-Werror" not in compile_command("12.8")
        strict = compile_command("12.8", FASTFT_CXXFLAGS="-g -Werror")
        assert (
            "-Werror all-warnings" in strict and "-warn-spills,-warn-lmem-usage,-Werror" in strict
        )
        assert "FASTFT_CXXFLAGS=-Werror" in (ROOT / ".ci" / "run").read_text()


def python_of(version: str) -> str | None:
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(folder.glob(f"{version}.*/bin/python"))
    return str(found[-1]) if found else shutil.which(f"python{version}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_one_wheel_for_every_python(checkout: Path) -> None:
    """The library loads and registers in other Pythons, which have no torch: the loader is shown
    the folder of ours."""
    library = checkout / "libfastft_cpu.so"
    library.write_bytes(
        zipfile.ZipFile(wheel(checkout, FASTFT_BUILD_CUDA="0")).read("fastft/_lib/libfastft_cpu.so")
    )
    torch_lib = Path(torch.__file__).parent / "lib"
    script = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); lib.fastft_cpu_isa.restype = "
        "ctypes.c_char_p"
    )
    script += (
        "; lib.fastft_register.restype = ctypes.c_char_p; assert lib.fastft_register() is None"
    )
    script += "; print(lib.fastft_cpu_isa())"
    pythons = [python for version in OTHER_PYTHONS if (python := python_of(version))]
    if not pythons:
        pytest.skip("no other Python on this machine")
    for python in pythons:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(torch_lib)}
        done = subprocess.run(
            [python, "-c", script, str(library)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.startswith("b'"), (python, done.stderr)
