"""Runs every benchmark and keeps what came out: results/<machine>.json, tables in Markdown and pictures.

python benchmarks/record.py --machine cpu [--only adamw collator]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch

import fastft
from fastft import _native

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def run(only: list[str] | None) -> list[dict]:
    """The benchmarks' names with their extra_info."""
    files = [str(HERE / f"test_{stem}.py") for stem in only] if only else [str(HERE)]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "benchmarks.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",
            "--benchmark-only",
            f"--benchmark-json={written}",
            *files,
        ]
        subprocess.run(command, check=True, cwd=HERE.parent)
        benchmarks = json.loads(written.read_text())["benchmarks"]
    return [{"name": each["name"].removeprefix("test_"), **each["extra_info"]} for each in benchmarks]


def machine() -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    described = {"commit": commit, "fastft": fastft.__version__, "torch": torch.__version__}
    described |= {"python": platform.python_version(), "cpu_isa": _native.cpu_isa(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        described |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    else:
        described["cpu"] = cpu_name()
    return described


def cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in listing.read_text().splitlines() if line.startswith("model name")
    ]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def table(rows: list[dict]) -> str:
    lines = [
        "| benchmark | ours, ms | rival / ours (above 1: ours is faster) | ours / limit | GB/s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "median_ms" not in row:
            continue
        rivals = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["times_faster_than"].items())
        limit, rate = row.get("times_the_limit", ""), row.get("gigabytes_per_second", "")
        lines.append(f"| {row['name']} | {row['median_ms']['ours']:.3f} | {rivals} | {limit} | {rate} |")
    return "\n".join(lines)


def exactness(rows: list[dict]) -> str:
    """Where it was measured, the error against float64, and memory, beside the time."""
    lines = []
    for row in rows:
        for who, errors in row.get("relative_errors", {}).items():
            found = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
            lines.append(f"| {row['name']} | {who} | {row['median_ms'][who]:.1f} | {row['peak_mib'][who]} | {found} |")
    header = ["| benchmark | who | ms | peak, MiB | relative errors |", "|---|---|---|---|---|"]
    return "\n".join([*header, *lines]) if lines else ""


def memory_growth(rows: list[dict]) -> str:
    """Peak memory by the number of tokens."""
    lines = []
    for row in rows:
        for who, peaks in row.get("peak_mib", {}).items():
            if isinstance(peaks, dict) and peaks:
                found = ", ".join(f"{tokens}: {peak}" for tokens, peak in peaks.items())
                lines.append(f"| {row['name']} | {who} | {found} |")
    return "\n".join(["| benchmark | who | tokens: peak, MiB |", "|---|---|---|", *lines]) if lines else ""


def plot_losses(rows: list[dict], path: Path, title: str) -> None:
    """Time and error of each way to the same loss, a pair of panels a benchmark."""
    rows = [row for row in rows if "loss" in row.get("relative_errors", {}).get("ours", {})]
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 1.7 * len(rows) + 0.6), layout="constrained", squeeze=False)
    for row, (time, error) in zip(rows, axes, strict=True):
        names = [*row["relative_errors"]][::-1]
        colors = ["#d9480f" if name == "ours" else "#8c8c8c" for name in names]
        drawn = time.barh(names, [row["median_ms"][name] for name in names], color=colors)
        time.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
        errors = [max(row["relative_errors"][name]["loss"], 1e-16) for name in names]
        error.bar_label(error.barh(names, errors, color=colors), fmt="{:.0e}", padding=3, fontsize=8)
        error.set(xscale="log", title="relative error of the loss", yticks=[])
        time.set_title(f"{row['name']}, {row['shape']}: ms")
        for panel in (time, error):
            panel.margins(x=0.2)
            panel.title.set_fontsize(9)
            panel.tick_params(labelsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def plot(rows: list[dict], path: Path, title: str) -> None:
    pairs = [
        (f"{row['name']}\nagainst {rival}", ratio)
        for row in rows
        for rival, ratio in row.get("times_faster_than", {}).items()
    ]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(pairs) + 1.2), layout="constrained")
    names, ratios = zip(*pairs[::-1], strict=True)
    drawn = axes.barh(names, ratios, color=["#2f9e44" if ratio >= 1 else "#d9480f" for ratio in ratios])
    axes.bar_label(drawn, [f"{ratio:.2f}x" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", title=f"Rival's time / ours: {title}")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.15)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", required=True, help="names the files in benchmarks/results/")
    parser.add_argument("--only", help="the stems of some benchmark files, e.g. adamw", nargs="+")
    options = parser.parse_args()
    rows, where = run(options.only), machine()
    stem = RESULTS / (options.machine if options.only is None else f"{options.machine}-{options.only[0]}")
    stem.with_suffix(".json").write_text(json.dumps({"machine": where, "benchmarks": rows}, indent=1) + "\n")
    described = ", ".join(f"{key} {value}" for key, value in where.items())
    only = "" if options.only is None else f" --only {' '.join(options.only)}"
    command = f"`python benchmarks/record.py --machine {options.machine}{only}`"
    name = where.get("gpu") or where["cpu"]
    tables = "\n\n".join(filter(None, (table(rows), exactness(rows), memory_growth(rows))))
    stem.with_suffix(".md").write_text(f"# {name}\n\n{described}.\nMade by {command}.\n\n{tables}\n")
    if any("loss" in row.get("relative_errors", {}).get("ours", {}) for row in rows):
        plot_losses(rows, stem.with_name(f"{stem.name}-loss.png"), name)
    plot(rows, stem.with_suffix(".png"), name)
    print(table(rows))


if __name__ == "__main__":
    main()
