"""The time and memory of a training, without those of recording it.

The clock stands still and the peak of memory is taken anew while something is recorded: what the
recorder allocates counts for nothing once it is free again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from fastft.integrations.process_memory import highest, peak_since_reset, reset_peak, resident


class Costs:
    """The clock and the peaks, from when this is made.

    Attributes:
        seconds: that have passed, without those inside `stopped`.
        peak_device: bytes of the current CUDA device at most; None without one.
        peak_process: bytes of the process at most, above those at the beginning.
        kind: how `peak_process` is measured.
    """

    def __init__(self) -> None:
        self.seconds, self.peak_process = 0.0, 0
        self.peak_device: int | None = 0 if _has_device() else None
        self._resets = reset_peak()
        self.kind = (
            "resident memory, its high-water mark set back when training began"
            if self._resets
            else "resident memory at its highest, less what was the highest when training began"
        )
        self._base = resident() if self._resets else highest()
        self._begin()

    @contextlib.contextmanager
    def stopped(self, copies: int = 0) -> Iterator[None]:
        """Counts nothing meanwhile; of the time before, so many bytes were the recorder's."""
        _synchronise()
        self.seconds += time.perf_counter() - self._since
        process = (peak_since_reset() if self._resets else highest()) - self._base - copies
        self.peak_process = max(self.peak_process, process)
        if self.peak_device is not None:
            self.peak_device = max(self.peak_device, torch.cuda.max_memory_allocated())
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        _synchronise()
        if self._resets:
            reset_peak()
        if self.peak_device is not None:
            torch.cuda.reset_peak_memory_stats()
        self._since = time.perf_counter()


def _has_device() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _synchronise() -> None:
    if _has_device():
        torch.cuda.synchronize()
