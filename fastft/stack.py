"""Who is calling? Of what no event and no argument tells, only the stack knows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType


def callers() -> Iterator[FrameType]:
    """Yields the frame of the function that asks, its caller's, and so on outwards.

    `f_locals` of a frame keeps what its variables were alive until that function returns (before
    Python 3.13), a model too: ask only the frame that is meant.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
