"""Signals wait while something is done that must be done whole.

Python calls a signal's handler between any two of its instructions, and Ctrl-C's raises
KeyboardInterrupt there: mostly right behind the kernel that was running when the key was pressed.
A step of AdamW would have updated its weights then, and nobody would have counted it.
"""

from __future__ import annotations

import signal
import threading

# without the enums of `signal`, whose conversions take as long as a third of a small step
from _signal import getsignal
from _signal import signal as set_handler
from types import FrameType
from typing import Any

# those for which programs have handlers that raise; those of other signals report or end a process
_NUMBERS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


class Held:
    """`with Held():` handlers written in Python are called when the block has ended.

    In other threads than the main one, to which Python gives no signals, nothing is done. One
    inside another waits for the outer one.
    """

    __slots__ = ("_came", "_handlers")

    def __enter__(self) -> None:
        self._handlers: list[tuple[int, Any]] = []
        self._came: list[tuple[Any, int, FrameType | None]] = []
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in _NUMBERS:
                handler = getsignal(number)
                if callable(handler):
                    self._handlers.append((number, handler))
                    set_handler(number, self._note)
        except BaseException:  # a handler that is still to be replaced has raised
            self._give_back()
            raise

    def __exit__(self, *error: object) -> None:
        self._give_back()
        self._call()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append((dict(self._handlers)[number], number, frame))

    def _give_back(self) -> None:
        try:
            while self._handlers:
                set_handler(*self._handlers[-1])
                self._handlers.pop()
        finally:
            if self._handlers:  # one that was given back has raised
                self._give_back()

    def _call(self) -> None:
        try:
            while self._came:
                handler, number, frame = self._came.pop(0)
                handler(number, frame)
        finally:
            if self._came:
                self._call()
