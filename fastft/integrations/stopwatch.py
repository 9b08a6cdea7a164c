"""The time that the parts of training take, of a GPU's own clock, without waiting for it."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds of spans, of which one runs at a time.

    On a CPU they are the host's. A GPU is behind the host, which asks for more than is done yet:
    there an event goes into the current stream with the work, and its time is read when it has
    passed. A span in which the stream has nothing to do, as when data are late, is as long as that.

    Args:
        device: whose time is taken; devices without events for it have the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type not in ("cpu", "mps", "meta"):
            self._event = getattr(torch.get_device_module(device), "Event", None)
        self._marks: deque[tuple[str | None, Any]] = deque()  # a span and the moment it began
        self._seconds: dict[str, float] = defaultdict(float)

    def begin(self, span: str | None) -> None:
        """Ends the span that runs and begins another; None is one that is not counted."""
        self._marks.append((span, self._now()))
        while len(self._marks) > 1 and self._has_passed(self._marks[1][1]):
            self._take_first()

    def discard(self) -> None:
        """Does not count the span that runs."""
        if self._marks:
            self._marks[-1] = None, self._marks[-1][1]

    def read(self) -> dict[str, float]:
        """The seconds of all spans that have ended since the last time; waits for the device."""
        if self._event is not None and self._marks:
            self._marks[-1][1].synchronize()
        while len(self._marks) > 1:
            self._take_first()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _now(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def _has_passed(self, moment: Any) -> bool:
        return self._event is None or moment.query()

    def _take_first(self) -> None:
        span, begun = self._marks.popleft()
        ended = self._marks[0][1]
        if span is not None:
            timed = ended - begun if self._event is None else begun.elapsed_time(ended) / 1000
            self._seconds[span] += timed
