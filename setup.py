"""Builds fastft's two native libraries, for the CPU and for CUDA, into the Python package.

Neither needs torch, Python.h or a GPU to be built: they are linked against empty libraries that
carry torch's SONAMEs, so that at run time the loader finds the libtorch which `import torch` has
already loaded. This file only writes the rules; ninja compiles in parallel, follows header
dependencies and rebuilds no more than what changed. Where a compiler is missing the package is
installed without that library and `python -m fastft` tells why.

FASTFT_BUILD_CPU,    auto (default), 0, or 1 to fail where the library cannot be built
FASTFT_BUILD_CUDA
FASTFT_CUDA_ARCHS    default "75;80;86;89;90;100;120+PTX", of which those are built that nvcc knows
FASTFT_CXXFLAGS      extra flags for every C++ file and for the link, e.g. sanitizers; with -Werror,
                     as CI has it, nvcc takes warnings and spilled registers for errors too
CXX                  the C++ compiler, another architecture's too: the CPU library is then for that
CUDA_HOME, MAX_JOBS  as everywhere
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# -ffp-contract=off: every instruction set gives the same bits, but for a NaN's payload. Without
# -fno-math-errno gcc calls sqrtf and vectorises nothing. Never -ffast-math: gcc 12 then links code
# that flushes denormals for the whole process.
CXXFLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "-mprefer-vector-width=512",
]
# Files named *_kernel.cpp are compiled once for each of these, as FASTFT_ISA; csrc/cpu/isa.h
# chooses at run time. Other architectures than x86-64 have the baseline alone.
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=256"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
CUDA_ARCHS = "75;80;86;89;90;100;120+PTX"
NVCCFLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
# Another ptxas may need a register more than there is: it costs a user some speed, not the library.
NVCCFLAGS_OF_CI = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror"]


class Unavailable(Exception):
    """The library cannot be built here; the message is what `python -m fastft` shows."""


def find_cxx():
    for candidate in filter(None, [os.environ.get("CXX"), "g++", "c++", "clang++"]):
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise Unavailable("no C++ compiler found (set CXX, or install g++)")


def find_nvcc():
    """Returns nvcc's path, its (major, minor) version and the folder of libcudart_static.a."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [None, "/usr/local/cuda/bin"]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if nvcc is None:
        raise Unavailable("nvcc not found (set CUDA_HOME)")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", printed)
    if not release or (version := (int(release[1]), int(release[2]))) < (12, 4):
        raise Unavailable(f"{nvcc} is not an nvcc of CUDA 12.4 or newer")
    # nvcc may be a wrapper script: only its dry run tells where the toolkit lies
    dry = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    top = re.search(r"#\$ TOP=(.*)", subprocess.run(dry, capture_output=True, text=True).stderr)
    toolkit = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (toolkit / folder / "libcudart_static.a").exists():
            return nvcc, version, toolkit / folder
    raise Unavailable(f"libcudart_static.a not found under {toolkit}")


def gencode_flags(nvcc):
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listing))
    wanted = os.environ.get("FASTFT_CUDA_ARCHS", CUDA_ARCHS).strip().lower().replace(".", "")
    names = re.split(r"[;,\s]+", wanted)
    entries = [(name.removesuffix("+ptx"), name.endswith("+ptx")) for name in names]
    built = {arch: ptx for arch, ptx in entries if arch.rstrip("af") in known}
    for arch in (arch for arch, _ in entries if arch not in built):
        print(f"fastft: this nvcc does not know sm_{arch}: left out", file=sys.stderr)
    if not built:
        raise Unavailable("nvcc knows none of the architectures of FASTFT_CUDA_ARCHS")
    # newer chips than nvcc knows need some
    if any(ptx for _, ptx in entries) and not any(built.values()):
        built[max(built, key=lambda arch: int(arch.rstrip("af")))] = True
    flags = []
    for arch, ptx in built.items():
        code = f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}"
        flags += ["-gencode", f"arch=compute_{arch},code={code}"]
    return flags


def quote(words):
    return shlex.join(map(str, words)).replace("$", "$$")


def builds_for_x86(cxx):
    """Says whether a compiler, which may be a cross compiler, makes code for x86-64."""
    # clang is told its target by flags that need not show in its name; its macros know
    macros = [*cxx, *shlex.split(os.environ.get("FASTFT_CXXFLAGS", "")), "-dM", "-E", "-x", "c++"]
    printed = subprocess.run([*macros, os.devnull], capture_output=True, text=True).stdout
    return "#define __x86_64__ " in printed


def cpu_objects(cxx):
    """Yields (source, object name, flags) for each compilation of the CPU library."""
    x86 = builds_for_x86(cxx)
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if not source.stem.endswith("_kernel"):
            yield source, f"{source.stem}.o", []
            continue
        for isa, flags in INSTRUCTION_SETS.items():
            if x86 or isa == "baseline":
                yield source, f"{source.stem}_{isa}.o", [*flags, f"-DFASTFT_ISA={isa}"]


def write_rules(kind, folder):
    """Writes folder/build.ninja for one of the libraries."""
    from ninja.ninja_syntax import Writer

    cxx, extra = find_cxx(), shlex.split(os.environ.get("FASTFT_CXXFLAGS", ""))
    library, libs = f"libfastft_{kind}.so", []
    if kind == "cuda":
        nvcc, version, cudart = find_nvcc()
        # compressed device code is free with CUDA 13, whose drivers all know it
        size = ["--compress-mode=size"] if version >= (13, 0) else []
        strict = NVCCFLAGS_OF_CI if "-Werror" in extra else []
        compiler = [nvcc, "-ccbin", cxx[0], *NVCCFLAGS, *strict, *size, *gencode_flags(nvcc)]
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        objects = [(source, f"{source.stem}.o", []) for source in sources]
        libs = [f"-L{cudart}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    else:
        compiler, objects = [*cxx, *CXXFLAGS, *extra], list(cpu_objects(cxx))
    with open(folder / "build.ninja", "w") as file:
        rules = Writer(file, width=200)
        compile_ = f"{quote(compiler)} $flags -I{quote([CSRC / 'include'])}"
        compile_ += " -MD -MF $out.d -c $in -o $out"
        rules.rule("compile", compile_, depfile="$out.d", deps="gcc", description=f"{kind}: $out")
        rules.rule(
            "stub", f"{quote(cxx)} -shared -nostdlib -Wl,-soname,$out -x c++ /dev/null -o $out"
        )
        # linked aside and renamed: an interrupted build leaves no half library behind
        # with -g somebody wants to read names and lines in what a sanitizer reports
        strip = "" if "-g" in extra else " -s"
        link = f"{quote([*cxx, *extra])} -shared{strip} -o $out.part $in"
        link += " -Wl,--no-as-needed -L. $torch -Wl,--as-needed"
        exports = quote([f"-Wl,--version-script={CSRC / 'exports.map'}"])
        link += f" {quote(libs)} {exports} -Wl,-z,relro -Wl,--gc-sections && mv $out.part $out"
        rules.rule("link", link, description=f"{kind}: $out")
        for source, name, flags in objects:
            rules.build(name, "compile", str(source), variables={"flags": quote(flags)})
        torch = ["torch_cpu"] + (["torch_cuda"] if kind == "cuda" else [])
        stubs = [f"lib{name}.so" for name in torch]
        for stub in stubs:
            rules.build(stub, "stub")
        variables = {"torch": " ".join(f"-l{name}" for name in torch)}
        rules.build(library, "link", [name for _, name, _ in objects], stubs, variables=variables)
    return folder / library


def compile_library(kind):
    """Returns the path of the built library; raises Unavailable, with the reason, without one."""
    if os.environ.get(f"FASTFT_BUILD_{kind.upper()}") == "0":
        raise Unavailable(f"FASTFT_BUILD_{kind.upper()}=0")
    try:
        import ninja
    except ImportError:
        raise Unavailable("the build tool ninja is missing (pip install ninja)") from None
    if not sys.platform.startswith("linux"):
        raise Unavailable(
            f"the kernels are for Linux, this is {platform.system()}: plain torch computes"
        )
    folder = ROOT / "build" / "native" / kind
    folder.mkdir(parents=True, exist_ok=True)
    library = write_rules(kind, folder)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), *jobs]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Unavailable(f"compilation failed: {done.stdout[-4000:]}")
    return library


class BuildLibraries(build_ext):
    """Puts the libraries, and what became of them (build_info.json), into fastft/_lib."""

    def run(self):
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib)) / "fastft" / "_lib"
        folder.mkdir(parents=True, exist_ok=True)
        info = {}
        for kind in ("cpu", "cuda"):
            installed = folder / f"libfastft_{kind}.so"
            try:
                built = compile_library(kind)
                part = installed.with_suffix(".part")
                shutil.copy(built, part)
                # a running process keeps the library that it has mapped
                os.replace(part, installed)
                content = installed.read_bytes()
                info[kind] = {"sha256": hashlib.sha256(content).hexdigest()}
                print(f"fastft: {installed.name} built, {len(content)} bytes", file=sys.stderr)
            except Unavailable as reason:  # what an earlier build left may not fit today's schemas
                installed.unlink(missing_ok=True)
                if os.environ.get(f"FASTFT_BUILD_{kind.upper()}") == "1":
                    message = f"fastft: {installed.name} cannot be built: {reason}"
                    raise SystemExit(message) from None
                info[kind] = {"missing": str(reason)}
                print(f"fastft: {installed.name} NOT built: {reason}", file=sys.stderr)
        (folder / "build_info.json").write_text(json.dumps(info, indent=1))

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """No Python C API is used: one wheel serves every Python, with nothing built every platform."""

    def get_tag(self):
        built = self.bdist_dir and list(Path(self.bdist_dir).rglob("libfastft_*.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    ext_modules=[Extension("fastft._lib", [])],  # tells setuptools that there is something to build
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
