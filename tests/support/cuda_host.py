"""Builds the .cu files with g++ and cuda_on_host.h, and registers their operators for CPU tensors.

`operators(folder)` has every operator of csrc/cuda under its own name; the seed of the order in which the threads of a
block run is the environment variable FASTFT_EMULATION_SEED, 0 for first to last.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastft.ops import OPERATORS

NAMESPACE = "fastft_emulated"
CSRC = Path(__file__).resolve().parents[2] / "csrc"
_FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-ffp-contract=off", "-fvisibility=hidden"]

# the device's part of libtorch, and registration under a name of its own
_SHIM = r"""
#include "cuda_on_host.h"
#include "shim.h"
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
FASTFT_EXPORT int register_emulated(const char* name) {
  static TorchLibraryHandle library;
  int failed = aoti_torch_library_init_impl(name, "CPU", __FILE__, __LINE__, &library);
  for (fastft::Kernel* k = fastft::Kernel::first(); k && !failed; k = k->next)
    failed = torch_library_impl(library, k->name, k->function, fastft::kAbi);
  return failed;
}
"""


def build(folder: Path, sources: list[Path], flags: tuple[str, ...] = ()) -> Path:
    """Compiles `sources` into a shared library in `folder`; raises with the compiler's words if it cannot."""
    for header in ("cuda_runtime.h", "cuda_fp16.h"):
        (folder / header).write_text('#include "cuda_on_host.h"\n')
    (folder / "shim.cpp").write_text(_SHIM)
    library, torch_libraries = folder / "libemulated.so", Path(torch.__file__).parent / "lib"
    includes = [f"-I{path}" for path in (folder, Path(__file__).parent, CSRC / "include", CSRC / "cuda")]
    files = ["-x", "c++", folder / "shim.cpp", *sources, "-x", "none"]
    command = ["g++", *_FLAGS, *flags, *includes, *files, f"-L{torch_libraries}", "-ltorch_cpu", "-o", library]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return library


def operators(folder: Path) -> Any:
    """`torch.ops.fastft_emulated`, with the kernels of csrc/cuda; built in `folder` by the first call of a process."""
    if hasattr(operators, "library"):
        return getattr(torch.ops, NAMESPACE)
    names = ("adamw_", "cross_entropy_rows", "packed_boundaries")
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name in names:
        definitions.define(str(OPERATORS[name].native._schema).partition("::")[2])
    sources = sorted(path for path in (CSRC / "cuda").glob("*.cu") if path.stem != "library")
    loaded = ctypes.CDLL(str(build(folder, sources)))
    assert loaded.register_emulated(NAMESPACE.encode()) == 0
    loaded.definitions = definitions  # a definition lives as long as its Library
    operators.library = loaded
    return getattr(torch.ops, NAMESPACE)
