"""What a training on a CPU frees stays with the process until the next step asks for it.

glibc gives the end of its heap back to the system whenever 64 MiB of it are free (mallopt(3),
M_TRIM_THRESHOLD). Packs have other lengths from step to step, heaps end elsewhere after each, and
what was given back is fetched again, 4 KiB at a time: up to a third of a step. A training's peak is
what it would be without.
"""

from __future__ import annotations

import contextlib
import os

from torch import nn

from fastft import _native

_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def _is_set_by_user() -> bool:
    """Whether malloc has been told by environment variables (mallopt(3)) when to do so."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name in os.environ for name in _SETTINGS)


def keep_freed_memory(model: nn.Module, kept: contextlib.ExitStack) -> None:
    """Has malloc keep what is freed until `kept` is closed, which gives all of it back; not where
    the model is on a GPU."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if on_cpu and not _is_set_by_user() and _native.keep_freed(True):
        kept.callback(_native.keep_freed, False)
