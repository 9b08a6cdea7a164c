"""What a training on a CPU frees stays with the process until the next step asks for it.

glibc gives the end of its heap back to the system where enough of it is free (mallopt(3),
M_TRIM_THRESHOLD): 128 KiB, and later up to 64 MiB. Packs have other lengths from step to step,
heaps end elsewhere after each, and what was given back is fetched again, 4 KiB at a time: up to a
third of a step. Peaks were no higher (benchmarks/NOTES.md). What is free before the first step goes
back: pieces between small objects, in which no tensor has room.
"""

from __future__ import annotations

import contextlib
import os

from torch import nn

from fastft import _native

# each of them turns glibc's own rules off, as mallopt does
_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
)
_trainings = 0  # that have malloc keep what is freed, one inside another


def _is_set_by_user() -> bool:
    """Whether malloc has been told by environment variables (mallopt(3)) when to do so."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name in os.environ for name in _SETTINGS)


def keep_freed_memory(model: nn.Module, kept: contextlib.ExitStack) -> None:
    """Has malloc give back what is free, and keep what is freed from here on until `kept`, and that
    of every other training, is closed, which gives it back; not where the model is on a GPU."""
    global _trainings
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if on_cpu and not _is_set_by_user() and (_trainings > 0 or _native.keep_freed(True)):
        _trainings += 1
        kept.callback(_give_back)


def _give_back() -> None:
    global _trainings
    _trainings -= 1
    if _trainings == 0:
        _native.keep_freed(False)
