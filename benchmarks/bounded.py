"""A command in a process group of its own, which ends when its time is over, with all that it has
started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SILENT = "nothing heard"  # how `Ended.why` begins where `silence` is the reason
_POLL = 0.1  # seconds
# seconds of the limit, at most a quarter, in which who is interrupted may write down what he has
_GRACE = 6.0


@dataclass(frozen=True)
class Ended:
    """`status`: as of subprocess; `why`: the reason where we have ended it, "" where it came to its
    end itself."""

    seconds: float
    status: int
    why: str = ""


def environment(**more: str) -> dict[str, str]:
    """Of a command: ours, with this checkout and the benchmarks' modules to import."""
    path = [str(ROOT), str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def run(
    command: Sequence[str],
    *,
    seconds: float | None,
    log: Path | None = None,
    heard: Callable[[], bool] = lambda: False,
    silence: float | None = None,
    more: dict[str, str] | None = None,
) -> Ended:
    """Runs `command` in the checkout.

    Args:
        seconds: after which it is ended at the latest, what it takes to end it included; None:
            whenever it ends.
        log: what its output is appended to; None: it goes where ours goes.
        heard: asked ten times a second whether it has made progress since the last time.
        silence: seconds without progress, after the first, after which it is ended; None: it may be
            silent.
        more: variables of its environment.
    """
    began, last = time.monotonic(), None
    grace = 0.0 if seconds is None else min(_GRACE, seconds / 4)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log else None
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**(more or {})),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        why = ""
        try:
            while process.poll() is None and not why:
                time.sleep(_POLL)
                now = time.monotonic()
                last = now if heard() else last
                if seconds is not None and now - began > seconds - grace:
                    why = f"not finished after {now - began:.0f} s"
                elif silence is not None and last is not None and now - last > silence:
                    why = f"{SILENT} for {silence:.0f} s"
            if why:
                _interrupt(process, grace)
        finally:  # also of what a command that came to its end has left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            heard()
    return Ended(time.monotonic() - began, process.returncode, why)


def _hear_interrupts() -> None:
    """Under nohup, or behind a shell's &, Ctrl-C is ignored, and so it would be by all that we
    start: what hung would go on as if nothing had been when its children are ended, and would count
    as passed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(process: subprocess.Popen, grace: float) -> None:
    """Ctrl-C for the leader; the others, who may hang and keep it waiting, end at once."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGINT)
    time.sleep(min(0.5, grace / 4))
    for other in _members(process.pid) - {process.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(grace - 1.0, grace / 4))


def _members(group: int) -> set[int]:
    """The processes of a process group, where /proc lists them."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                found.add(int(stat.parent.name))
    return found
