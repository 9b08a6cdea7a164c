"""Memory of the host for optimizer states: how much there is, and states moved there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastft.foreign.tensors import around, local
from fastft.optim.offload.device import Device

_MEMINFO, _CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_GIB = 2**30


def house(entries: dict[str, Any], device: Device) -> None:
    """Moves a state's tensors to memory of the host that `device` copies from and to by itself.

    Meta tensors become zeros there. `step`, which never leaves the host, stays as it is.
    """
    for name, entry in list(entries.items()):
        part = local(entry) if name != "step" else None
        if not isinstance(part, Tensor) or device.reaches(part):
            continue
        layout = torch.empty_like(part, device="meta")  # dense, whatever `part` is
        memory = device.host_memory(layout.numel() * layout.itemsize)
        housed = memory.view(layout.dtype).as_strided(layout.shape, layout.stride())
        housed.zero_() if part.is_meta else housed.copy_(part)
        entries[name] = around(housed, entry)


def check_that_it_suffices(needed: int) -> None:
    """Raises where the host has less memory than `needed` bytes for each process of this machine.

    Raises:
        RuntimeError: says how much is needed and how much there is.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = available()
    if there is not None and needed * processes > there:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise RuntimeError(
            f"offloading needs {needed / _GIB:.1f} GiB of host memory{each}, and "
            f'{there / _GIB:.1f} GiB are available: take moments="bf16" or "8bit", or a machine '
            "with more memory"
        )


def available() -> int | None:
    """Bytes that processes can still get: of the system, and of the control group that limits this
    one; None where nobody says."""
    limits = [limit for limit in (_of_system(), _of_group()) if limit is not None]
    return min(limits, default=None)


def _of_system() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:  # only Linux has it
        return None
    found = [line for line in lines if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _of_group() -> int | None:
    """What is left of the limit of a container: version 2 of control groups, else version 1."""
    files = (
        (_CGROUPS, "memory.max", "memory.current", "inactive_file"),
        (
            _CGROUPS / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    )
    for folder, limit, usage, cache in files:
        try:
            most, used = (folder / limit).read_text(), int((folder / usage).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        if most.strip() == "max":
            return None
        # files that the kernel lets go of when memory is wanted
        freed = sum(int(line.split()[1]) for line in lines if line.split()[0] == cache)
        return int(most) - used + freed
    return None
