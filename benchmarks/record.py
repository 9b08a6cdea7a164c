"""Runs every benchmark and keeps what came out: results/<machine>.json, a table in Markdown and a picture.

python benchmarks/record.py --machine cpu [--only adamw]
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


def run(only: str | None) -> list[dict]:
    """The benchmarks' names with their extra_info."""
    files = [str(HERE / f"test_{only}.py")] if only else [str(HERE)]
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
        rivals = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["times_faster_than"].items())
        limit, rate = row.get("times_the_limit", ""), row.get("gigabytes_per_second", "")
        lines.append(f"| {row['name']} | {row['median_ms']['ours']:.3f} | {rivals} | {limit} | {rate} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path, title: str) -> None:
    pairs = [
        (f"{row['name']}\nagainst {rival}", ratio) for row in rows for rival, ratio in row["times_faster_than"].items()
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
    parser.add_argument("--only", help="one benchmark file's stem, e.g. adamw")
    options = parser.parse_args()
    rows, where = run(options.only), machine()
    stem = RESULTS / (options.machine if options.only is None else f"{options.machine}-{options.only}")
    stem.with_suffix(".json").write_text(json.dumps({"machine": where, "benchmarks": rows}, indent=1) + "\n")
    described = ", ".join(f"{key} {value}" for key, value in where.items())
    command = f"`python benchmarks/record.py --machine {options.machine}`"
    stem.with_suffix(".md").write_text(
        f"# {where.get('gpu') or where['cpu']}\n\n{described}.\nMade by {command}.\n\n{table(rows)}\n"
    )
    plot(rows, stem.with_suffix(".png"), where.get("gpu") or where["cpu"])
    print(table(rows))


if __name__ == "__main__":
    main()
