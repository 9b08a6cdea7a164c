"""Processes that `compare` starts one after the other: their output, their end, the time they take.

No child outlives the command: whatever ends it (Ctrl-C, SIGTERM, an exception) ends the child and
the processes that the child has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_TICK = 0.2  # seconds between two looks at a child
_GRACE = 10.0  # seconds in which torchrun ends its workers


def run(command: list[str], log: Path, watch: Callable[[float], None]) -> int:
    """Runs a command to its end.

    Args:
        command: the program and its arguments.
        log: the file that gets its output.
        watch: is called with the seconds since its start, several times a second.

    Returns:
        the exit code.
    """
    begin = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,  # it is run several times: there is no input for each
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all it starts can be ended
        )
        try:
            while True:
                watch(time.monotonic() - begin)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(_TICK)
        finally:
            if process.poll() is None:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    # a launcher gets the time to end workers in sessions of their own
    for number, seconds in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and a closed terminal interrupt as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a child's output, indented."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"    {line[:400]}" for line in lines[-count:] if line.strip())


class Progress:
    """Says which run is on, and how long the rest will take: with a bar where rich is installed and
    somebody watches, else a line for each run. On stderr.

    Runs take the time of those before; the first one is waited for without an estimate.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._took: list[float] = []
        self._bar: Any = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                self._bar = _rich_bar()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, left="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def estimate(self) -> float | None:
        """Seconds of a run, from those that are done; None before."""
        return sum(self._took) / len(self._took) if self._took else None

    def add(self, runs: int) -> None:
        """There will be more runs than was known."""
        self.total += runs

    def begin(self, name: str) -> None:
        """A run starts."""
        self._name = name
        if self._bar is None:
            self._say(f"[{self.done + 1}/{self.total}] {name}{self._rest(0.0)}")

    def watch(self, elapsed: float) -> None:
        """The run that is on has taken so many seconds."""
        if self._bar is not None:
            part = min(elapsed / self.estimate, 0.97) if self.estimate else 0.0
            text = f"{self._name}, {elapsed:.0f} s"
            self._bar.update(
                self._task,
                completed=self.done + part,
                total=self.total,
                description=text,
                left=self._rest(elapsed),
            )

    def end(self, seconds: float) -> None:
        """The run that is on has ended."""
        self.done += 1
        self._took.append(seconds)
        if len(self._took) == 1 and self.total > 1:
            more = self.total - 1
            self._say(
                f"One run takes {in_words(seconds)}: {more} more, {in_words(more * seconds)}."
            )

    def _rest(self, elapsed: float) -> str:
        if self.estimate is None:
            return ""
        seconds = max(self.estimate - elapsed, 0.0) + self.estimate * (self.total - self.done - 1)
        return f", about {in_words(seconds)} left"

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f} runs{task.fields[left]}"),
        console=Console(stderr=True),
        transient=True,
    )


def in_words(seconds: float) -> str:
    """ "4 s", "3 min 10 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
