"""The native libraries: what they need, what they export, and that a broken one never breaks the
import."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fastft
from fastft import _native

PACKAGE = Path(fastft.__file__).parent
CSRC = PACKAGE.parent / "csrc"
LIBRARIES = sorted((PACKAGE / "_lib").glob("libfastft_*.so"))
needs_cpu_library = pytest.mark.skipif(
    _native.missing("cpu") is not None, reason="no native CPU library"
)

REPORT = [sys.executable, "-m", "fastft"]


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "fastft", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def report(folder: Path, **environment: str) -> str:
    """What `python -m fastft` prints, warnings included."""
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(REPORT, cwd=folder, env=environment, text=True, **streams)
    assert done.returncode == 0, done.stdout
    return done.stdout


def flip(path: Path) -> None:
    """Of the right size, with one page of its code damaged: dlopen of such a file may end the
    process."""
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(byte ^ 0xFF for byte in content[4096:8192])
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def foreign(path: Path) -> None:
    source = path.with_suffix(".c")
    source.write_text("int nothing;")
    subprocess.run(["gcc", "-shared", "-o", str(path), str(source)], check=True)
    record = path.parent / "build_info.json"
    record.write_text(
        json.dumps({"cpu": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}})
    )


@needs_cpu_library
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "is damaged"),
        (garble, "is damaged"),
        (flip, "is damaged"),
        (foreign, "fastft_register"),
        (lambda path: path.unlink(), "not built"),
        (lambda path: (path.parent / "build_info.json").write_text("{"), "JSONDecodeError"),
        (lambda path: (path.parent / "build_info.json").unlink(), "is damaged"),
    ],
    ids=["truncated", "garbled", "a page", "foreign", "missing", "bad record", "no record"],
)
def test_a_broken_library_is_no_import_error(copied_package: Path, damage, reason: str) -> None:
    damage(copied_package / "fastft" / "_lib" / "libfastft_cpu.so")
    printed = report(copied_package)
    assert re.search(rf"libfastft_cpu: .*{reason}", printed), printed
    assert re.search(r"adamw_ +eager", printed), printed


@needs_cpu_library
def test_libraries_can_be_disabled(copied_package: Path) -> None:
    assert "libfastft_cpu: disabled by FASTFT_DISABLE" in report(
        copied_package, FASTFT_DISABLE="cpu"
    )


@needs_cpu_library
def test_an_unknown_library_to_disable_is_named_once(copied_package: Path) -> None:
    printed = report(copied_package, FASTFT_DISABLE="cpus, cuda,")
    assert "libfastft_cpu: loaded" in printed
    assert "libfastft_cuda: disabled by FASTFT_DISABLE" in printed
    said = "FASTFT_DISABLE=cpus, cuda,: 'cpus' is ignored: it must be one of cpu, cuda, all"
    assert printed.count("is ignored") == printed.count(said) == 1


@needs_cpu_library
@pytest.mark.parametrize("isa", _native._INSTRUCTION_SETS)
def test_the_instruction_set_can_be_capped(copied_package: Path, isa: str) -> None:
    best, printed = _native.cpu_isa(), report(copied_package, FASTFT_CPU_ISA=isa)
    if _native._INSTRUCTION_SETS.index(isa) <= _native._INSTRUCTION_SETS.index(best):
        assert f"kernels for {isa}," in printed and "FASTFT_CPU_ISA" not in printed
    else:
        assert (
            f"FASTFT_CPU_ISA={isa} is ignored: this processor lacks it; the CPU kernels run with "
            f"{best}" in printed
        )


@needs_cpu_library
def test_an_unknown_instruction_set_is_named(copied_package: Path) -> None:
    printed = report(copied_package, FASTFT_CPU_ISA="avx9")
    assert (
        "FASTFT_CPU_ISA=avx9 is ignored: it must be one of baseline, avx2, avx512, avx512bf16"
        in printed
    )
    assert f"kernels for {_native.cpu_isa()}," in printed


KERNELS = re.findall(
    r'\bkernel\w*\("(\w+)"', "".join(path.read_text() for path in (CSRC / "cpu").glob("*.cpp"))
)


@needs_cpu_library
@pytest.mark.parametrize("name", KERNELS)
def test_a_call_that_is_refused_lets_go_of_its_tensors(name: str) -> None:
    """Of those in lists too, which torch leaves to whoever reads them."""
    fastft._import_rooms()
    function, given = getattr(torch.ops.fastft, name).default, []

    def refused() -> torch.Tensor:
        given.append(torch.zeros(2, 2, dtype=torch.complex64))
        return given[-1]

    plain = {"int": 0, "float": 0.0, "bool": False}
    types = [str(argument.type) for argument in function._schema.arguments]
    arguments = [
        refused() if each == "Tensor" else plain[each] if each in plain else [refused(), refused()]
        for each in types
    ]
    with pytest.raises(RuntimeError, match="fastft: "):
        function(*arguments)
    watched = [StorageWeakRef(tensor.untyped_storage()) for tensor in given]
    del arguments
    given.clear()
    assert watched and all(storage.expired() for storage in watched)


def test_the_names_of_instruction_sets_are_those_of_the_kernels() -> None:
    (names,) = re.findall(r"kNames\[\] = \{(.*?)\}", (CSRC / "cpu" / "library.cpp").read_text())
    assert tuple(name.strip(' "') for name in names.split(",")) == _native._INSTRUCTION_SETS


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_shim_declarations_are_torchs(tmp_path: Path) -> None:
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip("this torch ships no C shim headers")
    both = tmp_path / "both.cpp"
    both.write_text(
        "#define USE_CUDA\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include "
        "<torch/csrc/stable/c/shim.h>\n"
        '#define FASTFT_SHIM_DECLARATIONS_ONLY\n#include "shim.h"\n'
    )
    includes = [
        f"-I{headers}",
        f"-I{CSRC / 'include'}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    done = subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", *includes, str(both)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def symbols(library: Path, *flags: str) -> set[str]:
    listing = subprocess.run(
        ["nm", "-D", *flags, str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines()}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
class TestLinkage:
    def test_exports_only_fastft(self, library: Path) -> None:
        assert {
            name for name in symbols(library, "--defined-only") if not name.startswith("fastft_")
        } == set()

    def test_needs_only_declared_symbols_of_torch(self, library: Path) -> None:
        declared = set(
            re.findall(r"\b((?:aoti_)?torch_\w+)\(", (CSRC / "include/shim.h").read_text())
        )
        needed = {name for name in symbols(library, "--undefined-only") if "torch" in name}
        assert needed and needed <= declared

    def test_carries_no_openmp(self, library: Path) -> None:
        assert not {
            name
            for name in symbols(library, "--undefined-only")
            if name.startswith(("omp_", "GOMP_"))
        }


COMPILED = sorted((PACKAGE.parent / "build/native/cpu").glob("*_kernel_*.o"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
@pytest.mark.skipif(not COMPILED, reason="the library was not built in this folder")
@pytest.mark.parametrize("compiled", COMPILED, ids=lambda path: path.stem)
def test_no_instruction_set_has_another_ones_functions(compiled: Path) -> None:
    """Of a weak symbol the linker keeps one copy for all, with whichever instructions it has."""
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", str(compiled)], capture_output=True, text=True, check=True
    ).stdout
    # a reference to data, in builds with less optimization
    found = [line for line in listing.splitlines() if "DW.ref." not in line]
    assert found and [line for line in found if line.split()[1] in "WVu"] == []
