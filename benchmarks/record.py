"""Runs every benchmark and keeps what came out: results/<machine>/<op>.json, a row a case; then
renews the pages that are made of these files (report.py).

python benchmarks/record.py [--only adamw collator] [--goals] [--rows PART]
python benchmarks/record.py --unsteady [--only adamw]
python benchmarks/record.py --ledger FILE

A file's cases have a process of their own: what another operation has left in malloc's hands would
spare some of these the pages of new memory. Each case is in results/<machine>/record.jsonl as soon
as it ends, and a failing one stops no other; that file goes when all have passed. --ledger takes
what `make gpu-check` has measured. Rows that were measured anew take the place of those of that
name; with --goals and --rows the others stay. --unsteady measures again what scatters so much that
it has failed; of two measurements of the same code the steadier one stays, whomever it favours.
What failed is printed at the end: rows that scatter, goals that were missed, and cases, for
which the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import goals
import machine
import one_by_one
import report
from ledger import Ledger
from tables import Row, failures, rows_of, scatters, table, unsteady

HERE = Path(__file__).resolve().parent
_SILENCE = 240.0  # seconds of a case, after which it hangs
OF_GPU_CHECK = ("smoke",)
# minutes that a GPU has better uses for
OF_THE_HOST = ("collator", "import", "memory", "plan", "rms_norm", "swiglu")


def stems(only: list[str] | None, gpu: bool) -> list[str]:
    """Of the benchmarks' files: these, or all that tell something on this machine."""
    left_out = OF_GPU_CHECK + (OF_THE_HOST if gpu else ())
    known = [path.stem.removeprefix("test_") for path in sorted(HERE.glob("test_*.py"))]
    return only or [stem for stem in known if stem not in left_out]


def write(
    path: Path,
    where: dict[str, Any],
    rows: list[Row],
    keep_others: bool,
    keep_steadier: bool = False,
) -> None:
    """The rows with their commit, sources and date; `keep_others`: beside those that the file has;
    `keep_steadier`: unless these are as steady, of the same sources."""
    today = datetime.date.today().isoformat()
    command = shlex.join(["python", "benchmarks/record.py", *sys.argv[1:]])
    of_all = {key: where.get(key) for key in ("commit", "sources")}
    new = {row["name"]: {**row, **of_all, "date": today, "command": command} for row in rows}
    old = {row["name"]: row for row in rows_of_file(path)} if keep_others else {}
    stay = {name for name in new if keep_steadier and _as_steady(old.get(name), new[name])}
    merged = old | {name: row for name, row in new.items() if name not in stay}
    content = {"machine": where, "rows": list(merged.values())}
    path.write_text(json.dumps(content, indent=1) + "\n")


def rows_of_file(path: Path) -> list[Row]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _as_steady(old: Row | None, new: Row) -> bool:
    """Whether an old row of the same code, measured in the same way, scatters no more than the new
    one."""
    same = old is not None and all(old.get(key) == new.get(key) for key in ("sources", "shape"))
    same = same and ("ratio_quartiles" in old) == ("ratio_quartiles" in new)
    return same and old.get("spread", math.inf) <= new.get("spread", math.inf)


def file(
    ledger: Ledger,
    part: str,
    chosen: list[str],
    where: dict[str, Any],
    keep_others: bool = False,
    keep_steadier: bool = False,
) -> list[Row]:
    """The rows of a ledger, in the file of each operation."""
    folder = report.RESULTS / machine.name(where)
    folder.mkdir(parents=True, exist_ok=True)
    found = {stem: rows_of(ledger, part, stem) for stem in chosen}
    for stem, rows in found.items():
        if rows:
            write(folder / f"{stem}.json", where, rows, keep_others, keep_steadier)
    return [row for rows in found.values() for row in rows]


def scattering(path: Path) -> list[str]:
    """Options of pytest that choose the rows of a file that have failed."""
    return [f"--row={row['name']}" for row in rows_of_file(path) if scatters(row)]


def taken(path: Path) -> list[str]:
    """Files what `make gpu-check` has measured; sentences about cases that have failed."""
    ledger = Ledger(path)
    where = next(line["facts"] for line in ledger.lines() if "facts" in line)
    file(ledger, "ops", stems(None, gpu=True), where)
    return failures(ledger, "ops")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="the stems of some benchmark files, e.g. adamw", nargs="+")
    parser.add_argument("--rows", help="part of the names of rows, e.g. '50M'", default="")
    parser.add_argument("--goals", help="the rows of goals.py alone", action="store_true")
    parser.add_argument("--unsteady", help="the rows that have failed", action="store_true")
    parser.add_argument("--ledger", help="<gpu>.jsonl of make gpu-check", type=Path)
    options = parser.parse_args()
    if options.ledger:
        print("\n".join(taken(options.ledger)))
        report.write()
        return
    where, some = machine.facts(), bool(options.goals or options.rows or options.unsteady)
    folder = report.RESULTS / machine.name(where)
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / "record.jsonl")
    ledger.path.unlink(missing_ok=True)
    selected = ["--benchmark-only", f"--rows={options.rows}", *["--goals"] * options.goals]
    chosen, why = stems(options.only, "gpu" in where), ["interrupted"]
    named = {stem: [] for stem in chosen}
    if options.unsteady:
        named = {stem: scattering(folder / f"{stem}.json") for stem in chosen}
        chosen = [stem for stem in chosen if named[stem]]
    try:
        why = [
            one_by_one.run(
                [HERE / f"test_{stem}.py"],
                ledger,
                "ops",
                options=[*selected, *named[stem]],
                silence=_SILENCE,
            )
            for stem in chosen
        ]
    finally:
        rows = file(ledger, "ops", chosen, where, some, options.unsteady)
        report.write()
        print(table(rows))
    wrong = [*failures(ledger, "ops"), *filter(None, why)]
    missed = [
        f"{each.row}: {each.what} {each.found}, goal {each.goal}: {each.verdict}"
        for each in goals.judge({row["name"]: row for row in rows})
        if not each.reached
    ]
    print("\n".join(["", *unsteady(rows), *missed, *wrong]))
    if wrong:
        raise SystemExit(f"Some cases have failed: {ledger.path} has what they said.")
    ledger.path.unlink()


if __name__ == "__main__":
    main()
