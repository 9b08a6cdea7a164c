"""The campaign for reliability, on this commit: `make fuzz SECONDS=600`, `make sanitize`, `make
soak`. What each says at its end is kept in results/campaign.md.

make campaign        or: python benchmarks/campaign.py [fuzz sanitize soak]

Results of a target that was not asked for stay, with the commit that they were found on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# what to run, and the lines of its output that say what came of it
TARGETS = {
    "fuzz": (["fuzz", "SECONDS=600"], r"\w+: [\d,]+ cases in \d+ s"),
    "sanitize": (["sanitize"], r".{22} +files +tests .*|.{22}(?: +\d+){5}|\d+ runs, .*"),
    "soak": (["soak"], r"\w+: [\d,]+ turns: .*"),
}
FAILED = r"FAILED .*|ERROR .*|.*: it ended with status \d+|.*Sanitizer: .*|.*runtime error: .*"


def run(name: str) -> dict[str, Any]:
    """Runs a target; shows all that it says."""
    arguments, said = TARGETS[name]
    command, begin, lines = ["make", *arguments], time.monotonic(), []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    facts = machine.facts()
    return {
        "command": " ".join(command),
        "clean": process.returncode == 0,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "said": [line for line in lines if re.fullmatch(f"{said}|{FAILED}", line)],
        "commit": facts["commit"],
        "machine": f"{facts['cpu']}, {facts['processor_isa']}",
        "versions": f"torch {facts['torch']}, transformers {facts['packages']['transformers']}",
    }


def page(kept: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The lines of campaign.md."""
    yield "# The campaign for reliability"
    yield from ("", "What the targets of [reliability](../../docs/reliability.md) said when they")
    yield "were run for long, by `make campaign`."
    for name in TARGETS:
        if name in kept:
            row = kept[name]
            outcome = "clean" if row["clean"] else "NOT clean"
            yield from ("", f"## `{row['command']}`: {outcome}", "")
            yield f"{row['minutes']} minutes; commit {row['commit']}; {row['machine']};"
            yield from (f"{row['versions']}.", "", "```text", *row["said"], "```")
            if note := row.get("note"):  # by hand, until the target runs again
                yield from ("", note)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # an empty list is what argparse checks where none is named
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], default=[])
    wanted = parser.parse_args().targets or list(TARGETS)
    file = RESULTS / "campaign.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    for name in wanted:
        kept[name] = run(name)
        file.write_text(json.dumps(kept, indent=1) + "\n")
        (RESULTS / "campaign.md").write_text("\n".join(page(kept)) + "\n")
    return 0 if all(kept[name]["clean"] for name in wanted) else 1


if __name__ == "__main__":
    raise SystemExit(main())
