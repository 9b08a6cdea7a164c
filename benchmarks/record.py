"""Runs every benchmark and keeps what came out: results/<machine>.json, tables in Markdown and
pictures.

python benchmarks/record.py --machine cpu [--only adamw collator]

Each benchmark is in results/<machine>.jsonl as soon as it ends, and a failing one stops no other;
that file goes when all have passed. The exit status is 1 where one has not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import machine
import matplotlib
import one_by_one
from ledger import Ledger
from tables import Row, exactness, failures, memory_growth, rows_of, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
OF_GPU_CHECK = ("smoke",)
OF_THE_HOST = ("plan", "collator")  # minutes that a machine with a GPU has better uses for


def files(only: list[str] | None, gpu: bool) -> list[Path]:
    """The benchmarks' files: those of these stems, or all that tell something on this machine."""
    left_out = OF_GPU_CHECK + (OF_THE_HOST if gpu else ())
    stems = only or [path.stem.removeprefix("test_") for path in sorted(HERE.glob("test_*.py"))]
    return [HERE / f"test_{stem}.py" for stem in stems if only or stem not in left_out]


def plot_losses(rows: list[Row], path: Path, title: str) -> None:
    """Time and error of each way to the same loss, a pair of panels a benchmark."""
    rows = [row for row in rows if "loss" in row.get("relative_errors", {}).get("ours", {})]
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(11, 1.7 * len(rows) + 0.6), layout="constrained", squeeze=False
    )
    for row, (time, error) in zip(rows, axes, strict=True):
        names = [*row["relative_errors"]][::-1]
        colors = ["#d9480f" if name == "ours" else "#8c8c8c" for name in names]
        drawn = time.barh(names, [row["median_ms"][name] for name in names], color=colors)
        time.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
        errors = [max(row["relative_errors"][name]["loss"], 1e-16) for name in names]
        error.bar_label(
            error.barh(names, errors, color=colors), fmt="{:.0e}", padding=3, fontsize=8
        )
        error.set(xscale="log", title="relative error of the loss", yticks=[])
        time.set_title(f"{row['name']}, {row['shape']}: ms")
        for panel in (time, error):
            panel.margins(x=0.2)
            panel.title.set_fontsize(9)
            panel.tick_params(labelsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def plot(rows: list[Row], path: Path, title: str) -> None:
    pairs = [
        (f"{row['name']}\nagainst {rival}", ratio)
        for row in rows
        for rival, ratio in row.get("times_faster_than", {}).items()
    ]
    if not pairs:
        return
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(pairs) + 1.2), layout="constrained")
    names, ratios = zip(*pairs[::-1], strict=True)
    drawn = axes.barh(
        names, ratios, color=["#2f9e44" if ratio >= 1 else "#d9480f" for ratio in ratios]
    )
    axes.bar_label(drawn, [f"{ratio:.2f}x" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", title=f"Rival's time / ours: {title}")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.15)
    figure.savefig(path, dpi=100)


def write(stem: Path, where: dict[str, Any], rows: list[Row], command: str) -> None:
    """The JSON, the tables and the pictures beside it."""
    stem.with_suffix(".json").write_text(
        json.dumps({"machine": where, "benchmarks": rows}, indent=1) + "\n"
    )
    described = ", ".join(f"{key} {value}" for key, value in where.items() if key != "packages")
    name = where.get("gpu") or where["cpu"]
    tables = "\n\n".join(filter(None, (table(rows), exactness(rows), memory_growth(rows))))
    stem.with_suffix(".md").write_text(
        f"# {name}\n\n{described}.\nMade by {command}.\n\n{tables}\n"
    )
    if any("loss" in row.get("relative_errors", {}).get("ours", {}) for row in rows):
        plot_losses(rows, stem.with_name(f"{stem.name}-loss.png"), name)
    plot(rows, stem.with_suffix(".png"), name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", required=True, help="names the files in benchmarks/results/")
    parser.add_argument("--only", help="the stems of some benchmark files, e.g. adamw", nargs="+")
    options = parser.parse_args()
    stem = RESULTS / (
        options.machine if options.only is None else f"{options.machine}-{options.only[0]}"
    )
    only = "" if options.only is None else f" --only {' '.join(options.only)}"
    where, ledger = machine.facts(), Ledger(stem.with_suffix(".jsonl"))
    ledger.path.unlink(missing_ok=True)
    ledger.append(part="machine", **where)
    why = "interrupted"
    try:
        chosen = files(options.only, "gpu" in where)
        why = one_by_one.run(chosen, ledger, "benchmarks", options=["--benchmark-only"])
    finally:
        rows = rows_of(ledger, "benchmarks")
        write(stem, where, rows, f"`python benchmarks/record.py --machine {options.machine}{only}`")
        print(table(rows))
    wrong = [*failures(ledger, "benchmarks"), *filter(None, [why])]
    if wrong:
        raise SystemExit(
            "\n".join(["", *wrong, f"What has been measured is in {ledger.path} and beside it."])
        )
    ledger.path.unlink()


if __name__ == "__main__":
    main()
