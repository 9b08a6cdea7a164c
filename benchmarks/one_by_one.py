"""The cases of pytest files, each kept as it ends: one that fails, dies or hangs costs itself
alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import bounded
from ledger import Ledger


def run(
    files: Sequence[Path],
    ledger: Ledger,
    part: str,
    *,
    options: Sequence[str] = (),
    seconds: float | None = None,
    silence: float | None = None,
    log: Path | None = None,
) -> str:
    """Runs every case of `files` once, in one process until a case fails, hangs or ends it; then in
    another, which goes on behind it.

    Args:
        ledger, part: where the lines go.
        options: of pytest.
        seconds: for all together; None: without a limit.
        silence: of a case; it hangs then, and the others go on without it.
        log: for what they print; None: it is shown.

    Returns:
        Why some cases have not run; "" if all have.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "pytest_ledger",
        "-p",
        "no:cacheprovider",
        "-m",
        "",
    ]
    command += [
        "--continue-on-collection-errors",
        f"--ledger={ledger.path}",
        f"--part={part}",
        "--not-again",
    ]
    while True:
        done = len(ledger.cases(part))
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return f"not finished after {seconds:.0f} s"
        ledger.news()  # what others have said is no sign of life
        ended = bounded.run(
            [*command, *options, *map(str, files)],
            seconds=left,
            silence=silence,
            log=log,
            heard=ledger.news,
        )
        hung = ended.why.startswith(bounded.SILENT)
        outcome = "hung" if hung else "cut off" if ended.why else "died"
        ledger.close(part, outcome, ended.why or f"its process ended with status {ended.status}")
        ledger.news()
        if ended.why and not hung:
            return f"not finished after {seconds:.0f} s"
        # 1: a file cannot be collected; 5: no case is left
        if not ended.why and ended.status in (0, 1, 5):
            return ""
        if len(ledger.cases(part)) == done:
            return ended.why or f"pytest ended with status {ended.status} before a case began"
