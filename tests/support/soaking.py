"""What a process holds while it does the same for long: looks at it, and the bounds that they are
held to.

A look counts after a collection of garbage, so that nothing is counted which only waits for one.
What was there before is frozen: a process with torch and transformers has a million objects, which
each look would go through.

Growth is the median of the slopes between any two looks of the later half (Theil and Sen), in units
a turn: what the first turns fill for good, and a few looks that are off, do not move it. Time is
the process's own, which neither neighbours nor a frozen machine change.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import pytest

PROC = Path("/proc/self")
needs_proc = pytest.mark.skipif(
    not (PROC / "smaps_rollup").exists(), reason="no /proc of Linux to look at"
)
# what may grow in a turn at most; a leak of one in a thousand turns is more than that of a count
COUNTS = {"objects": 0.2, "files": 1e-3, "threads": 1e-3, "temporary files": 1e-3}
BYTES = {"allocated": 512.0, "resident": 4096.0, "anonymous": 4096.0}
SLOWER = 1.5  # the last quarter's turns against the second's


class Grown(AssertionError):
    """Something grows where nothing may."""


_OF_MALLOC = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _OF_MALLOC]


class Watch:
    """Looks at this process, as a context.

    Args:
        folder: where it writes files; those that are there are counted.

    Attributes:
        turns: at which each look was.
        levels: what was found by each, by name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.turns: list[int] = []
        self.levels: dict[str, list[float]] = {}
        self._kinds: list[str] = []  # as JSON, which is no object that a look counts

    def __enter__(self) -> Watch:
        gc.collect()
        gc.freeze()
        self._clock = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()

    def look(self, turn: int) -> None:
        """Looks at the process behind this turn; the time that this takes is not counted."""
        passed = time.process_time() - self._clock
        before = self.turns[-1] if self.turns else 0
        gc.collect()
        self.turns.append(turn)
        kinds = Counter(type(each).__qualname__ for each in gc.get_objects())
        self._kinds.append(json.dumps(kinds))
        found = {
            "objects": kinds.total(),
            "files": len(os.listdir(PROC / "fd")),
            "threads": len(os.listdir(PROC / "task")),
            "temporary files": sum(len(files) for _, _, files in os.walk(self._folder)),
            **_memory(),
            "seconds": passed / max(1, turn - before),
        }
        for name, value in found.items():
            self.levels.setdefault(name, []).append(value)
        self._clock = time.process_time()

    def growth(self, name: str) -> float:
        """How much a level grows in a turn, in the later half of the looks."""
        begin = len(self.turns) // 2
        later = list(zip(self.turns[begin:], self.levels[name][begin:], strict=True))
        return median((b - a) / (to - at) for (at, a), (to, b) in combinations(later, 2))

    def check(self, bounds: dict[str, float], slower: float | None = None) -> None:
        """Raises where a level grows by more than its bound, or the last turns are so many times
        slower than earlier ones."""
        for name, bound in bounds.items():
            if name in self.levels and (grown := self.growth(name)) > bound:
                raise Grown(
                    f"{name} grow by {grown:.4g} a turn, {bound:.4g} at most: "
                    f"{_listed(self.levels[name])}{self._which(name)}"
                )
        if slower is not None:
            quarter = len(self.turns) // 4
            times = self.levels["seconds"]
            early, late = median(times[quarter : 2 * quarter]), median(times[-quarter:])
            if late > slower * early:
                raise Grown(
                    f"turns become slower: {early * 1e3:.3g} ms, then {late * 1e3:.3g} ms: "
                    f"{_listed([1e3 * each for each in times])}"
                )

    def said(self) -> str:
        """The levels at the middle and at the end, in one line."""
        half = len(self.turns) // 2
        parts = []
        for name, values in self.levels.items():
            unit, scale = {"seconds": (" ms", 1e3)}.get(name, ("", 1))
            if name in BYTES:
                unit, scale = " MiB", 2.0**-20
            early, late = (scale * each for each in (values[half], values[-1]))
            parts.append(f"{name} {early:,.6g} to {late:,.6g}{unit}")
        return f"{self.turns[-1]:,} turns: " + ", ".join(parts)

    def _which(self, name: str) -> str:
        if name != "objects":
            return ""
        half, last = (Counter(json.loads(self._kinds[at])) for at in (len(self._kinds) // 2, -1))
        grown = last - half
        return "; of these " + ", ".join(f"{kind} +{more}" for kind, more in grown.most_common(8))


def _memory() -> dict[str, float]:
    """Bytes that the system and malloc say this process holds."""
    lines = (PROC / "smaps_rollup").read_text().splitlines()[1:]
    rollup = {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in lines}
    # not Pss: its share of a library grows where a neighbour that has it too ends
    found = {"resident": rollup["Rss"], "anonymous": rollup["Anonymous"]}
    mallinfo: Any = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return found
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return found | {"allocated": float(info.uordblks + info.hblkhd)}


def _listed(values: list[float]) -> str:
    return ", ".join(f"{each:.7g}" for each in values[len(values) // 2 :][:12])
