"""Runs every benchmark and keeps what came out: results/<machine>/<op>.json, a row a case; then
renews the pages that are made of these files (report.py).

python benchmarks/record.py [--only adamw collator] [--goals] [--rows EXPRESSION]
python benchmarks/record.py --ledger FILE

Each case is in results/<machine>/<op>.jsonl as soon as it ends, and a failing one stops no other;
that file goes when all have passed. --ledger takes what `make gpu-check` has measured. Rows that
were measured anew take the place of those of that name; with --goals and --rows the others stay.
The exit status is 1 where a case has failed; a row whose times scatter is named, here and in the
report.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import goals
import machine
import one_by_one
import report
from ledger import Ledger
from tables import Row, failures, rows_of, table, unsteady

HERE = Path(__file__).resolve().parent
OF_GPU_CHECK = ("smoke",)
OF_THE_HOST = ("collator", "import", "memory", "plan")  # minutes that a GPU has better uses for


def stems(only: list[str] | None, gpu: bool) -> list[str]:
    """Of the benchmarks' files: these, or all that tell something on this machine."""
    left_out = OF_GPU_CHECK + (OF_THE_HOST if gpu else ())
    known = [path.stem.removeprefix("test_") for path in sorted(HERE.glob("test_*.py"))]
    return only or [stem for stem in known if stem not in left_out]


def write(path: Path, where: dict[str, Any], rows: list[Row], keep_others: bool) -> None:
    """The rows with their commit and date; `keep_others`: beside those that the file has."""
    today = datetime.date.today().isoformat()
    command = shlex.join(["python", "benchmarks/record.py", *sys.argv[1:]])
    new = {
        row["name"]: {**row, "commit": where["commit"], "date": today, "command": command}
        for row in rows
    }
    old = json.loads(path.read_text())["rows"] if keep_others and path.exists() else []
    merged = {row["name"]: row for row in old} | new
    content = {"machine": where, "rows": list(merged.values())}
    path.write_text(json.dumps(content, indent=1) + "\n")


def taken(path: Path) -> list[str]:
    """Files the rows of a ledger of `make gpu-check`; sentences about cases that have failed."""
    ledger = Ledger(path)
    where = next(line["facts"] for line in ledger.lines() if "facts" in line)
    folder = report.RESULTS / machine.name(where)
    folder.mkdir(exist_ok=True)
    for stem in stems(None, gpu=True):
        if rows := rows_of(ledger, "ops", stem):
            write(folder / f"{stem}.json", where, rows, keep_others=False)
    return failures(ledger, "ops")


def measure(
    stem: str, folder: Path, where: dict[str, Any], options: argparse.Namespace
) -> list[str]:
    """The cases of one file; sentences about those that have failed."""
    ledger = Ledger(folder / f"{stem}.jsonl")
    ledger.path.unlink(missing_ok=True)
    chosen = ["--benchmark-only"]
    chosen += [f"--rows={options.rows}"] if options.rows else ["--goals"] if options.goals else []
    why = "interrupted"
    try:
        why = one_by_one.run([HERE / f"test_{stem}.py"], ledger, stem, options=chosen)
    finally:
        rows = rows_of(ledger, stem)
        if rows:
            some = bool(options.goals or options.rows)
            write(folder / f"{stem}.json", where, rows, keep_others=some)
            print(table(rows))
    wrong = [*failures(ledger, stem), *filter(None, [why])]
    if not wrong:
        ledger.path.unlink(missing_ok=True)
    return [*wrong, *unsteady(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="the stems of some benchmark files, e.g. adamw", nargs="+")
    parser.add_argument("--rows", help="part of the names of rows, e.g. '50M'", default="")
    parser.add_argument("--goals", help="the rows of goals.py alone", action="store_true")
    parser.add_argument("--ledger", help="<gpu>.jsonl of make gpu-check", type=Path)
    options = parser.parse_args()
    if options.ledger:
        print("\n".join(taken(options.ledger)))
        report.write()
        return
    where = machine.facts()
    folder = report.RESULTS / machine.name(where)
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    for stem in stems(options.only, "gpu" in where):
        said += measure(stem, folder, where, options)
    report.write()
    missed = [each for each in goals.judge(report.rows_by_name(folder)) if not each.reached]
    said += [f"{each.row}: {each.what} {each.found}, goal {each.goal}" for each in missed]
    print("\n".join(["", *said]))
    if any(folder.glob("*.jsonl")):
        raise SystemExit(f"Some cases have failed: {folder}/*.jsonl")


if __name__ == "__main__":
    main()
