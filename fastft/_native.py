"""Loads the native libraries and remembers why one is not there.

Nothing here raises: a library that is missing, damaged or built for another machine costs speed,
never an import.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import re
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).resolve().parent / "_lib"
_INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512bf16")  # as in csrc/cpu/library.cpp
_DISABLED = ("cpu", "cuda", "all")


@functools.cache
def library(kind: str) -> ctypes.CDLL | str:
    """The loaded library `kind` ("cpu" or "cuda") with its kernels registered, or the reason why it
    is not usable."""
    try:
        return _load(kind)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def missing(kind: str) -> str | None:
    """Why the library `kind` is not loaded; None if it is."""
    loaded = library(kind)
    return loaded if isinstance(loaded, str) else None


@functools.cache
def cuda_unusable(device_index: int) -> str | None:
    """Why the CUDA kernels do not run on this device (driver too old, no code for the chip); None
    if they do."""
    loaded = library("cuda")
    if isinstance(loaded, str):
        return loaded
    error = loaded.fastft_cuda_probe(device_index)
    loaded.fastft_cuda_error.restype = ctypes.c_char_p
    return loaded.fastft_cuda_error(error).decode() if error else None


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use, e.g. "avx2"; None without the library."""
    loaded = library("cpu")
    return None if isinstance(loaded, str) else _instruction_set(loaded)


@functools.cache
def is_intel() -> bool:
    """Whether the processor is Intel's, as far as the CPU library, if there is one, knows."""
    loaded = library("cpu")
    return not isinstance(loaded, str) and bool(loaded.fastft_is_intel())


def expect_use(tensor: Tensor) -> Tensor:
    """Asks for large pages for new memory of the CPU, before it is first touched; returns it.

    Without them Linux takes longer to hand memory out than a pass over it takes.
    """
    loaded = library("cpu")
    # neither a compiler's nor a subclass's tensor need have memory
    has_memory = type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()
    if has_memory and not isinstance(loaded, str):
        loaded.fastft_expect_use(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))
    return tensor


def keep_freed(keep: bool) -> bool:
    """Has malloc give back what is free, and tells it whether to keep the end of its heap from now
    on; False where the C library is not glibc, or refuses."""
    loaded = library("cpu")
    return not isinstance(loaded, str) and bool(loaded.fastft_keep_freed(int(keep)))


def _load(kind: str) -> ctypes.CDLL | str:
    if not _disabled(os.environ.get("FASTFT_DISABLE", "")).isdisjoint((kind, "all")):
        return "disabled by FASTFT_DISABLE"
    if kind == "cuda" and torch.version.hip:  # its torch calls AMD's devices "cuda" too
        return "it is for NVIDIA's GPUs, this torch is built for AMD's ROCm"
    path, record = _FOLDER / f"libfastft_{kind}.so", _FOLDER / "build_info.json"
    built = json.loads(record.read_text()).get(kind, {}) if record.exists() else {}
    if not path.exists():
        return f"not built: {built.get('missing', f'{path.name} is missing')}"
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    if kind == "cuda" and torch.version.cuda is None:
        return "this torch build has no CUDA"
    if hashlib.sha256(path.read_bytes()).hexdigest() != built.get("sha256"):
        # dlopen of a damaged file ends the process with SIGBUS or SIGSEGV, which no except clause
        # catches
        return f"{path.name} is damaged (not the file that was built): reinstall fastft"
    loaded = ctypes.CDLL(str(path))
    loaded.fastft_register.restype = ctypes.c_char_p
    error = loaded.fastft_register()
    if error:
        return f"registration failed: {error.decode()}"
    if kind == "cpu":
        _check_instruction_set(loaded)
    return loaded


@functools.cache
def _disabled(asked: str) -> set[str]:
    """The libraries that FASTFT_DISABLE names; says once what is none."""
    names = {name.strip() for name in asked.split(",")} - {""}
    for name in sorted(names - {*_DISABLED}):
        logger.warning(
            "FASTFT_DISABLE=%s: %r is ignored: it must be one of %s",
            asked,
            name,
            ", ".join(_DISABLED),
        )
    return names


def _check_instruction_set(loaded: ctypes.CDLL) -> None:
    """Says so where FASTFT_CPU_ISA asks for what is not had."""
    wanted, used = os.environ.get("FASTFT_CPU_ISA"), _instruction_set(loaded)
    if not wanted or wanted == used:
        return
    known = wanted in _INSTRUCTION_SETS
    reason = (
        "this processor lacks it" if known else f"it must be one of {', '.join(_INSTRUCTION_SETS)}"
    )
    logger.warning(
        "FASTFT_CPU_ISA=%s is ignored: %s; the CPU kernels run with %s", wanted, reason, used
    )


def _instruction_set(loaded: ctypes.CDLL) -> str:
    loaded.fastft_cpu_isa.restype = ctypes.c_char_p
    return str(loaded.fastft_cpu_isa().decode())
