"""The native code with gcc's sanitizers: built aside, run, and what they have reported.

`build/sanitize/<kind>` has a copy of the package whose library they watch. What is run there
imports that copy; the package of the checkout stays as it is.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitize"
FLAGS = {
    # -static-libubsan: of two shared runtimes only one would write its reports into files
    "address": "-fsanitize=address -fsanitize=undefined -fsanitize=float-cast-overflow "
    "-static-libubsan",
    "thread": "-fsanitize=thread",
}
_ALWAYS = "-O1 -g -fno-omit-frame-pointer"
_REPORT = re.compile(
    r"^(.*runtime error: .*|.*(?:ERROR|WARNING): (?:Address|Leak|Thread)Sanitizer.*)$", re.M
)
_SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def missing() -> str | None:
    """Why nothing can be sanitized here; None if it can."""
    if shutil.which("g++") is None:
        return "no g++"
    names = ("libasan.so", "libtsan.so", "libubsan.a")
    absent = [name for name in names if not Path(_of_compiler(name)).is_absolute()]
    return f"g++ has no {', '.join(absent)}" if absent else None


def _of_compiler(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def flags(kind: str) -> list[str]:
    """Of the compiler, for the "address" or the "thread" sanitizer."""
    return shlex.split(f"{_ALWAYS} {FLAGS[kind]}")


def package(kind: str) -> Path:
    """The folder of a copy of the package whose CPU library was built with `flags(kind)`.

    Raises:
        CalledProcessError: it cannot be built.
    """
    folder = FOLDER / kind
    folder.mkdir(parents=True, exist_ok=True)
    for name in _SOURCES:
        shutil.copy(ROOT / name, folder)
    if not (folder / "csrc").exists():
        (folder / "csrc").symlink_to(ROOT / "csrc")
    shutil.rmtree(folder / "fastft", ignore_errors=True)
    shutil.copytree(
        ROOT / "fastft", folder / "fastft", ignore=shutil.ignore_patterns("_lib", "__pycache__")
    )
    build = {"FASTFT_BUILD_CPU": "1", "FASTFT_BUILD_CUDA": "0"}
    build["FASTFT_CXXFLAGS"] = shlex.join(flags(kind))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env={**os.environ, **build}, check=True)
    return folder


def program(kind: str) -> list[str]:
    """The command of support/kernel_digests.cpp with the library of `package(kind)`."""
    libraries, driver = FOLDER / kind / "build" / "native" / "cpu", FOLDER / kind / "digests"
    source = ROOT / "tests" / "support" / "kernel_digests.cpp"
    # of undefined behaviour the library's runtime alone is there: see FLAGS
    own = [*shlex.split(_ALWAYS), f"-fsanitize={kind}", "-pthread"]
    command = ["g++", "-std=c++17", *own, f"-I{ROOT / 'csrc' / 'include'}"]
    link = ["-rdynamic", f"-L{libraries}", "-lfastft_cpu", f"-Wl,-rpath-link,{libraries}"]
    subprocess.run([*command, str(source), *link, "-o", str(driver)], check=True)
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(driver)]


class Watched:
    """Commands whose reports go to files in `folder`, which is emptied first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def program(self, command: Sequence[str], **environment: str) -> int:
        """Runs a program that was compiled with sanitizers; returns its status."""
        return self._run(command, ROOT, environment, subprocess.DEVNULL)

    def _run(
        self, command: Sequence[str], cwd: Path, environment: dict[str, str], stdout: int | None
    ) -> int:
        options = {
            "ASAN_OPTIONS": f"log_path={self.folder}/address",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={self.folder}/undefined",
            "TSAN_OPTIONS": f"log_path={self.folder}/thread",
        }
        env = {**os.environ, **options, **environment}
        return subprocess.run(command, cwd=cwd, env=env, stdout=stdout).returncode

    def python(self, arguments: Sequence[str], package: Path, **environment: str) -> int:
        """Runs this Python with the package of a folder; returns its status.

        What Python and torch never free would be thousands of reports: leaks are for programs.
        """
        options = {
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={self.folder}/address",
            # Python knows no C++, whose exceptions the sanitizer has to find when it begins
            "LD_PRELOAD": f"{_of_compiler('libasan.so')} {_of_compiler('libstdc++.so')}",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": os.pathsep.join([str(package), str(ROOT / "tests")]),
        }
        # where it runs: Python's -m looks there first
        return self._run([sys.executable, *arguments], package, {**options, **environment}, None)

    def reports(self) -> list[str]:
        """The first line of each, in the order of the files' names."""
        texts = (path.read_text(errors="replace") for path in sorted(self.folder.iterdir()))
        return [line.strip() for text in texts for line in _REPORT.findall(text)]
