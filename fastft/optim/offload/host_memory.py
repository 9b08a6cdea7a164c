"""Memory of the host for optimizer states: how much there is, and states moved there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fastft.foreign.tensors import local, sharded_like
from fastft.optim.offload.device import Device

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# of a control group: the files of its limit and of what it uses, and cached files in memory.stat
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_GIB = 2**30


def house(entries: dict[str, Any], names: Iterable[str], device: Device) -> None:
    """Moves these of a state's entries to memory of the host that `device` copies from and to by
    itself; meta tensors become zeros there."""
    for name in names:
        entry = entries[name]
        part = local(entry)
        if device.reaches(part):
            continue
        layout = torch.empty_like(part, device="meta")  # dense, whatever `part` is
        memory = device.host_memory(layout.numel() * layout.itemsize)
        housed = memory.view(layout.dtype).as_strided(layout.shape, layout.stride())
        housed.zero_() if part.is_meta else housed.copy_(part)
        entries[name] = sharded_like(housed, entry)


def check_that_it_suffices(needed: int, processes: int) -> None:
    """Raises RuntimeError where the host has less memory than `needed` bytes for each process."""
    there = available()
    if there is not None and needed * processes > there:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise RuntimeError(
            f"offloading needs {needed / _GIB:.1f} GiB of host memory{each}, and "
            f'{there / _GIB:.1f} GiB are available: take moments="bf16", "8bit" or "4bit", '
            "or a machine with more memory"
        )


def processes_here() -> int:
    """How many processes a launcher has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available() -> int | None:
    """Bytes that processes can still get: of the system, and within the limits of the control
    groups of this one (containers, batch systems); None where nobody says."""
    return min((left for left in (_of_system(), *_of_groups()) if left is not None), default=None)


def _of_system() -> int | None:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:  # only Linux has it
        return None
    found = [line for line in lines if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _of_groups() -> Iterator[int]:
    """What is left within each limit on the way from this process's control group to the root."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (_CGROUPS / "memory", _VERSION_1) if controllers else (_CGROUPS, _VERSION_2)
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            left = _left_of(root / folder, *names)
            if left is not None:
                yield left


def _left_of(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """What is left of a control group's limit; None where it has none."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    # of files, which the kernel lets go of when memory is wanted
    freed = sum(int(line.split()[1]) for line in stat if line.startswith(f"{cache} "))
    return None if most == "max" else int(most) - used + freed
