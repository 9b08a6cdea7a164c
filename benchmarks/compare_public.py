"""`python -m fastft compare` on training scripts that no one here wrote, unchanged and offline.

python benchmarks/compare_public.py FOLDER [--only NAME ...] [--steps N] [--runs 1] [--jobs N]

FOLDER has clones of the repositories in `public_scripts.py`, under their names, at revisions that
fit the installed versions. Each script runs with tiny models and data made on the spot
(`public_folder.py`). Writes results/public-scripts.json, a script at a time, so that what is there
stays when the command is ended, and results/public-scripts.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from public_folder import PublicFolder
from public_scripts import REPOSITORIES, SCRIPTS, PublicScript

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUTCOMES = {0: "equal", 1: "different", 2: "could not run"}
INTRODUCTION = """# Public training scripts

The example scripts of four repositories, unchanged, each through `python -m fastft compare`: is a
training with fastft the same as stock, within stock's own noise? Made by
`make compare-public SCRIPTS=folder`. Models are tiny (64 wide, 8,192 tokens) and have random
weights, data is cut from docstrings of Python's standard library: memory and speed of such models
say little about real ones, equality does. Where "packing" has no sentence the loss and the
optimizer alone are compared.
"""


def revision(clone: Path) -> str:
    """The commit of a clone, or why it is not known."""
    asked = subprocess.run(
        ["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return asked.stdout.strip() or "no clone"


def compare(
    script: PublicScript, clones: Path, folder: PublicFolder, options: list[str]
) -> dict[str, Any]:
    """One script's entry of the results."""
    repository = script.path.partition("/")[0]
    entry: dict[str, Any] = {
        "path": script.path.partition("/")[2],
        "repository": repository,
        "revision": revision(clones / repository),
        "arguments": script.arguments,
    }
    file = clones / script.path
    if not file.is_file():
        return entry | {"outcome": "not there", "sentence": "no such file in this folder"}
    out = folder.path / "compared" / script.name
    command = [sys.executable, "-m", "fastft", "compare", *options, "--only", script.pieces]
    command += ["--out", str(out), str(file)]
    ended = subprocess.run(
        [*command, *shlex.split(script.arguments)],
        cwd=folder.path,
        env=os.environ | folder.environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    entry["outcome"] = OUTCOMES.get(ended.returncode, f"exit code {ended.returncode}")
    if ended.returncode not in (0, 1):
        return entry | {"sentence": sentence(ended.stderr)}
    return entry | figures(json.loads((out / "report.json").read_text()))


def sentence(stderr: str) -> str:
    """Why nothing was compared: compare's own sentence, else the last line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("fastft compare: ")]
    return (own or lines or ["nothing was said"])[-1].removeprefix("fastft compare: ")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """What the table and a reader of the JSON need of a report."""
    stock, fast = report["stock"], report["fastft"]
    causes = [finding["sentence"] for finding in report["verdict"]["findings"]]
    return {
        "sentence": f"{report['cause']}: {causes[0]}" if causes else "",
        "trainer": report["trainer"],
        "model": report["model"],
        "steps": report["steps"],
        "losses": {name: report["losses"][name] for name in ("stock 1", "fastft 1", "noise")},
        "lines": report["lines"],
        "fused": report["fused"],
        "materialised": report["materialised"],
        "skipped": report["skipped"],
        "speedup": fast["speedup"],
        "peak": fast["peak"] / stock["peak"] if fast["peak"] and stock["peak"] else None,
        "versions": report["versions"],
        "machine": report["machine"],
    }


def run(clones: Path, names: list[str], options: list[str], jobs: int) -> None:
    """Compares the scripts of these names, all without a name; keeps the others' results."""
    chosen = [script for script in SCRIPTS if not names or script.name in names]
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(jobs) as pool:
        folder = PublicFolder(Path(made))
        for script in chosen:
            for need in script.needs:
                folder.provide(need)

        def one(script: PublicScript) -> None:
            entry = compare(script, clones, folder, options) | {"jobs": jobs}
            with lock:
                save(load() | {script.path: entry})
                print(f"{entry['outcome']:15} {script.path}  {entry['sentence']}", flush=True)

        list(pool.map(one, chosen))


def load() -> dict[str, dict[str, Any]]:
    """The entries of earlier runs, by the path of their script."""
    file = RESULTS / "public-scripts.json"
    known = {script.path for script in SCRIPTS}
    entries = json.loads(file.read_text()) if file.exists() else {}
    return {path: entry for path, entry in entries.items() if path in known}


def save(entries: dict[str, dict[str, Any]]) -> None:
    """Both files, in the order of the table of scripts."""
    ordered = {script.path: entries[script.path] for script in SCRIPTS if script.path in entries}
    (RESULTS / "public-scripts.json").write_text(json.dumps(ordered, indent=1) + "\n")
    (RESULTS / "public-scripts.md").write_text("\n".join(page(list(ordered.values()))) + "\n")


def page(entries: list[dict[str, Any]]) -> Iterator[str]:
    """The table's lines, a section for a repository."""
    counts = Counter(entry["outcome"] for entry in entries)
    total = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    yield from [INTRODUCTION, f"**{len(entries)} scripts: {total}.**"]
    for repository, home in REPOSITORIES.items():
        own = [entry for entry in entries if entry["repository"] == repository]
        if not own:
            continue
        yield f"\n## {repository}\n\n{home} at `{own[0]['revision'][:12]}`\n"
        yield "| script | model | outcome | loss | optimizer | packing | tokens/s | peak |"
        yield "|---|---|---|---|---|---|---:|---:|"
        yield from map(row, own)
        yield from remarks(own)
    yield from versions(entries)


def row(entry: dict[str, Any]) -> str:
    """A line of the table; dashes where nothing was compared."""
    lines, speed, peak = entry.get("lines", {}), entry.get("speedup"), entry.get("peak")
    cells = (
        f"`{entry['path'].removeprefix('examples/')}`",
        entry.get("model", "-"),
        entry["outcome"],
        *(lines.get(piece, "-").partition(":")[0] for piece in ("loss", "optimizer", "packing")),
        f"{speed['value']:.2f}x ({speed['low']:.2f} to {speed['high']:.2f})" if speed else "-",
        f"{peak:.2f}x" if peak else "-",
    )
    return f"| {' | '.join(cells)} |"


def remarks(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Sentences below a table, each once: why something differs, did not run, was left alone."""
    said: dict[str, list[str]] = {}
    for entry in entries:
        lines = entry.get("lines", {})
        left = [f"{piece} {lines[piece]}" for piece in lines if ": " in lines[piece]]
        for remark in filter(None, [entry["sentence"], *left]):
            said.setdefault(remark, []).append(entry["path"].rpartition("/")[2])
    for remark, scripts in said.items():
        if not remark.startswith("packing off"):
            yield f"\n* {', '.join(scripts)}: {remark}"


def versions(entries: list[dict[str, Any]]) -> Iterator[str]:
    """What the last comparison ran on, and how busy the machine was."""
    compared = [entry for entry in entries if "versions" in entry]
    if compared:
        names = ("python", "torch", "transformers", "accelerate", "peft", "trl", "datasets")
        found = compared[-1]["versions"]
        yield "\n" + ", ".join(f"{name} {found[name]}" for name in names if name in found)
        machine = compared[-1]["machine"]
        yield f"\n{machine['processor']}, {machine['cores']} cores, {machine['threads']} for a run"
        yield f"\nAt least {min(entry['steps'] for entry in compared)} optimizer steps a run."
        jobs = max(entry.get("jobs", 1) for entry in compared)
        if jobs > 1:
            yield f"\n{jobs} scripts ran at a time: tokens/s tell little, equality is not touched."


def main() -> int:
    """0 unless a script trains otherwise with fastft."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="clones of the scripts' repositories")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run_clm, sft ...")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run (20)")
    parser.add_argument("--runs", type=int, choices=(1, 2), default=2, help="as compare's (2)")
    parser.add_argument("--jobs", type=int, default=1, help="scripts at a time (1)")
    options = parser.parse_args()
    unknown = set(options.only) - {script.name for script in SCRIPTS}
    if unknown or not options.folder.is_dir():
        parser.error(f"unknown: {', '.join(sorted(unknown)) or options.folder}")
    how = ["--steps", str(options.steps), "--runs", str(options.runs)]
    run(options.folder.resolve(), options.only, how, options.jobs)
    return int(any(entry["outcome"] == "different" for entry in load().values()))


if __name__ == "__main__":
    sys.exit(main())
