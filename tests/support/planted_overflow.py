"""Faults in the native code that a sanitizer must report, or it does not watch the library which
was loaded.

    python -m support.planted_overflow {heap,alignment,cuda}

has the CPU library read past the end of memory, or a number that lies askew, or has the launchers
of CUDA, over the fake runtime, read past the end of the host's memory.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

import fastft

fastft._import_rooms()


def lying(numbers: int, dtype: torch.dtype, *, short: int = 0, askew: int = 0) -> Tensor:
    """A tensor in memory of malloc that is `short` bytes shorter, `askew` bytes into it."""
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    bytes_ = askew + numbers * dtype.itemsize
    place = malloc(ctypes.c_size_t(bytes_ - short))
    memory = (ctypes.c_char * bytes_).from_address(place)
    return torch.frombuffer(memory, dtype=dtype, offset=askew)


def norm_of(gradient: Tensor) -> None:
    torch.ops.fastft.grad_norm_squared_(torch.zeros((), dtype=torch.float64), [gradient])


def bind_on_cuda(table: Tensor) -> None:
    from support import ptx

    states = [[torch.zeros(4)] for _ in range(3)]
    with ptx.cuda_operators(90) as gpu:
        gpu.ops.adamw_bind(*states, [], [], table.view(1, 4))


FAULTS = {
    "heap": lambda: norm_of(lying(16, torch.float32, short=4)),
    "alignment": lambda: norm_of(lying(16, torch.float32, askew=1)),
    "cuda": lambda: bind_on_cuda(lying(4, torch.int64, short=24)),
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
