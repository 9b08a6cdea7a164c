"""Results as they come: a line of JSON for whatever begins and ends, on the disk before the next
thing happens."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Line = dict[str, Any]
ENDS = ("passed", "failed", "skipped", "died", "hung", "cut off")  # of a case; "begun" is no end


class Ledger:
    """A file of lines, each with a `part`, mostly with a `case` of it and its `outcome`; several
    processes append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def append(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**line, "at": round(time.time(), 2)}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[Line]:
        """All lines that are whole: who was killed while writing leaves half of one."""
        found = []
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def cases(self, part: str) -> dict[str, Line]:
        """The last line of each case of a part, in the order in which they began."""
        return {
            line["case"]: line
            for line in self.lines()
            if line.get("part") == part and "case" in line
        }

    def close(self, part: str, outcome: str, why: str) -> None:
        """Gives an end to the cases that have begun and will not end by themselves."""
        for case, line in self.cases(part).items():
            if line["outcome"] not in ENDS:
                self.append(part=part, case=case, outcome=outcome, said=why)

    def news(self) -> bool:
        """Shows what was appended since the last call; whether there was anything."""
        lines = self.lines()
        new, self._read = lines[self._read :], len(lines)
        for line in new:
            if line.get("outcome") in ENDS and "case" in line:
                took = f" {line['seconds']:.1f} s" if "seconds" in line else ""
                said = "" if line["outcome"] == "passed" else f": {last_line(line.get('said', ''))}"
                print(f"  {line['outcome']:>7}{took}  {line['case']}{said}", flush=True)
        return bool(new)


def last_line(text: str) -> str:
    """What a traceback says at its end, or pytest in its lines of "E"."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines or ["nothing said"])[0 if errors else -1][:300]
