"""Pages made of results/<machine>/<op>.json: results/README.md with its pictures, and the tables of
README and docs between `<!-- figures ... -->` and `<!-- to here -->`.

python benchmarks/report.py

The marker of a table in a page says what it has, by patterns of names of rows, several with "; "
between them:

    <!-- figures times: adamw[50M_*]; adamw_clipped[400_mixed] -->     rival's time / ours
    <!-- figures ms: plan[1M] -->                                      milliseconds of all
    <!-- figures memory: linear_cross_entropy[fp32-*] -->              MiB at the peak
    <!-- figures training: demo smollm2 -->                            stock, fastft, pieces
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import goals
from tables import Row, exactness, grid, memory_growth, table, unsteady

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = RESULTS / "README.md"
TRAININGS = {"demo": "demo", "smollm2": "SmolLM2-135M"}
TRAININGS |= {"whole_demo": "demo, rivals", "whole_smollm2": "SmolLM2-135M, rivals"}
TRAININGS |= {"whole_smollm2_rows": "SmolLM2-135M, full rows"}
OPS = {
    "adamw": "AdamW",
    "linear_cross_entropy": "Linear cross-entropy",
    "linear_log_probs": "Log-probabilities",
    "trl_head": "TRL's fused head",
    "cross_entropy": "Cross-entropy over logits",
    "attention": "Attention of packed rows",
    "swiglu": "Gated units",
    "rms_norm": "Norms",
    "collator": "Collating",
    "boundaries": "Boundaries of a batch",
    "plan": "Planning packs",
    "memory": "Memory of Trainer",
    "import": "Import",
}
HEAD = """# Measured

*This page and its pictures are made of the JSON files beside it by `python benchmarks/report.py`.*

Ours runs by turns with each rival in one process, after its results passed a check
(`benchmarks/compare.py`). A time is a median; rival / ours is the median of their ratios turn for
turn, and IQR the largest interquartile range of these as a share of its median (rows without
`ratio_quartiles` are older: ratios of medians, ranges of times): above 5 % all was measured again,
up to four times, above 10 % the row counts as failed. Above 1 ours is faster; **bold** is slower.

*Bare work* is what cannot be left out, done alone: products, reading and writing as many bytes, or
of attention each document by itself in torch's.
It can be beaten, by who is spared a part of it. The *bound* cannot: bytes (of rows that no cache
holds) and products at the highest rate that this machine showed. *Share of the bound* is bound /
ours. A goal is *bounded* where it lies beyond the rival's time / the bound, or that of the bare
work, of the row's run, and ours does not beat it: whoever does this work cannot reach the goal.
Of a training it is the products of its layers and AdamW's bytes (`benchmarks/bare_step.py`), and
what is judged is the median of the steps' ratios, where the table of trainings has tokens/s.
What scatters by more than 10 % reaches a goal by its worse quartile alone, and bounds nothing."""


def machines() -> dict[str, Path]:
    """The folders of results by the machine's name."""
    return {path.name: path for path in sorted(RESULTS.iterdir()) if any(path.glob("*.json"))}


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """What was recorded of each operation on a machine."""
    found = {op: folder / f"{op}.json" for op in OPS}
    return {op: json.loads(path.read_text()) for op, path in found.items() if path.exists()}


def rows_by_name(folder: Path) -> dict[str, Row]:
    return {row["name"]: row for each in recorded(folder).values() for row in each["rows"]}


def page() -> str:
    """The text of results/README.md."""
    parts = [HEAD, "## Machines", _machines(), "## What was promised", _promised()]
    parts += ["## Whole trainings", *_trainings()]
    for op, title in OPS.items():
        for name, folder in machines().items():
            rows = recorded(folder).get(op, {"rows": []})["rows"]
            if rows:
                parts += [f"## {title}: {name}", table(rows), exactness(rows), memory_growth(rows)]
    parts += ["## Pictures", *_pictures()]
    return "\n\n".join(filter(None, parts)) + "\n"


def _machines() -> str:
    same: dict[tuple[object, ...], list[str]] = {}
    for name, folder in machines().items():
        for op, found in recorded(folder).items():
            where, rows = found["machine"], found["rows"]
            versions = f"torch {where['torch']}, Python {where['python']}"
            limited = ", ".join(f"{key}={value}" for key, value in where.get("limited", {}).items())
            hardware = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
            made = {(str(row["commit"]), row["date"], f"`{row['command']}`") for row in rows}
            told = [", ".join(sorted(set(each))) for each in zip(*made, strict=True)]
            same.setdefault((name, hardware, limited, versions, *told), []).append(op)
    header = ["machine", "processor", "limited by", "versions", "commit", "date", "command"]
    return grid([*header, "results"], [[*told, ", ".join(ops)] for told, ops in same.items()])


def _promised() -> str:
    lines: list[list[object]] = []
    failed = []
    for name, folder in machines().items():
        rows = rows_by_name(folder)
        for each in [*goals.judge(rows), *_of_trainings(folder)]:
            lines.append([name, each.row, each.what, each.goal, each.found, each.verdict])
        failed += [f"* {name}: {sentence}" for sentence in unsteady(list(rows.values()))]
    told = grid(["machine", "row", "against", "goal", "found", "reached"], lines)
    return "\n\n".join(filter(None, [told, "Failed, as they scatter:" * bool(failed), *failed]))


def _of_trainings(folder: Path) -> Iterator[goals.Reached]:
    for name in goals.WHOLE_RUNS:
        path = folder / f"{name}.json"
        if path.exists():
            yield from goals.judge_training(name, json.loads(path.read_text()))


def _trainings() -> Iterator[str]:
    lines = [
        [name, title, *line]
        for name, folder in machines().items()
        for which, title in TRAININGS.items()
        for line in training(folder / f"{which}.json")
    ]
    yield grid(["machine", "training", *_TRAINING], lines) if lines else ""
    for path in sorted(RESULTS.glob("*/losses.png")):
        yield f"![Losses of {path.parent.name}]({path.relative_to(RESULTS)})"


_TRAINING = [
    "run",
    "tokens/s",
    "times stock",
    "peak, MiB",
    "of stock's",
    "padding",
    "losses off by",
]


def training(path: Path) -> list[list[object]]:
    """A line for each run of a whole training: `make demo`, or `fastft compare`."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if "runs" in found:
        stock, *others = found["runs"]
        off = {each["name"]: each["largest_difference"] for each in found["agreement"]}
        return [
            [
                run["name"],
                f"{run['tokens_per_second']:,.0f}",
                f"{run['tokens_per_second'] / stock['tokens_per_second']:.2f}x",
                f"{run['peak_bytes'] / 2**20:,.0f}",
                f"{run['peak_bytes'] / stock['peak_bytes']:.0%}",
                f"{run['padding']:.0%}",
                f"{off[run['name']]:.0e}" if run["name"] in off else "",
            ]
            for run in [stock, *others]
        ]
    return _compared(found)


def _compared(found: dict[str, Any]) -> list[list[object]]:
    """The lines of `fastft compare`'s JSON."""
    stock, lines = found["stock"], []
    differences = found["verdict"]["loss"]["difference"]
    for name in ("stock", "fastft"):
        run, ours = found[name], name == "fastft"
        times = run["speedup"]["value"] if ours else 1.0
        line: list[object] = [name, f"{run['tokens_per_second']['value']:,.0f}", f"{times:.2f}x"]
        line += [f"{run['peak'] / 2**20:,.0f}", f"{run['peak'] / stock['peak']:.0%}"]
        line += [f"{run['padding']:.0%}", f"{max(differences):.0e}" if ours else ""]
        lines.append(line)
    return lines


def losses(path: Path) -> dict[str, list[float]]:
    """Of each step, by the name of the run."""
    found = json.loads(path.read_text())
    if "runs" in found:
        return {run["name"]: run["losses"] for run in found["runs"]}
    return {"stock": found["verdict"]["loss"]["stock"], "fastft": found["verdict"]["loss"]["fast"]}


PICTURES = ("times.png", "memory.png")


def _pictures() -> Iterator[str]:
    for name, folder in machines().items():
        for picture in PICTURES:
            if (folder / picture).exists():
                yield f"![{picture.partition('.')[0]} of {name}]({name}/{picture})"


def draw() -> None:
    """The pictures of every machine: times and memory as bars, losses as curves."""
    import matplotlib

    matplotlib.use("Agg")
    for name, folder in machines().items():
        rows = rows_by_name(folder)
        times = {
            f"{row} | {rival}": ratio
            for row, found in rows.items()
            for rival, ratio in found.get("times_faster_than", {}).items()
        }
        memory = {
            f"{row} | {who}": peak / found["peak_mib"]["ours"]
            for row, found in rows.items()
            for who, peak in found.get("peak_mib", {}).items()
            if who != "ours" and not isinstance(peak, dict)
        }
        for picture, bars, title in zip(
            PICTURES, (times, memory), ("rival's time / ours", "rival's peak / ours"), strict=True
        ):
            if bars:
                _bars(folder / picture, bars, f"{name}: {title}")
        curves = {which: folder / f"{which}.json" for which in TRAININGS}
        if any(path.exists() for path in curves.values()):
            _curves(folder / "losses.png", {k: p for k, p in curves.items() if p.exists()})


def _bars(path: Path, bars: dict[str, float], title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 0.22 * len(bars) + 1), layout="constrained")
    names, ratios = [*bars][::-1], [*bars.values()][::-1]
    colors = ["#2f9e44" if ratio >= 1 else "#d9480f" for ratio in ratios]
    drawn = axes.barh(names, ratios, color=colors)
    axes.bar_label(drawn, [f"{ratio:.2f}x" for ratio in ratios], padding=3, fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", title=title)
    axes.tick_params(axis="y", labelsize=6)
    axes.margins(x=0.12, y=0.005)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _curves(path: Path, trainings: dict[str, Path]) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(trainings), figsize=(5.5 * len(trainings), 3.5), layout="constrained", squeeze=False
    )
    for (which, source), axes in zip(trainings.items(), panels[0], strict=True):
        for number, (run, values) in enumerate(losses(source).items()):
            style = {"linewidth": 4 if number == 0 else 1.2, "alpha": 0.4 if number == 0 else 1}
            axes.plot(range(1, len(values) + 1), values, label=run, **style)
        axes.set(title=TRAININGS[which], xlabel="step", ylabel="loss")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


_BLOCK = re.compile(r"(<!-- figures (\w+): (.*?) -->\n).*?(<!-- to here -->)", re.DOTALL)


def with_figures(text: str) -> str:
    """A page with the tables that its markers ask for."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{block(found[2], found[3])}\n\n{found[4]}", text)


def block(kind: str, asked: str) -> str:
    """The table of a marker."""
    folders = machines()
    if kind == "training":
        lines = [
            [TRAININGS[which], name, *line]
            for which in asked.split()
            for name, folder in folders.items()
            for line in training(folder / f"{which}.json")
        ]
        return grid(["training", "machine", *_TRAINING], lines)
    values = _VALUES[kind]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, folder in folders.items():
        for row, found in rows_by_name(folder).items():
            for who, value in values(found).items():
                if _matches(row, asked):
                    cells.setdefault((f"`{row}`", who), {})[name] = value
    if not cells:
        raise ValueError(f"no result has a row like {asked!r}")
    used = [name for name in folders if any(name in each for each in cells.values())]
    lines = [[*key, *(found.get(name, "") for name in used)] for key, found in cells.items()]
    return grid([_KINDS[kind], "", *used], lines)


def _matches(row: str, asked: str) -> bool:
    patterns = (pattern.replace("[", "[[]") for pattern in asked.split("; "))
    return any(fnmatch.fnmatchcase(row, pattern) for pattern in patterns)


def _times(row: Row) -> dict[str, str]:
    found = {who: f"{ratio:.2f}" for who, ratio in row.get("times_faster_than", {}).items()}
    if "times_the_bare_work" in row:
        found["(ours / bare work)"] = f"{row['times_the_bare_work']:.2f}"
    return found


def _milliseconds(row: Row) -> dict[str, str]:
    return {who: f"{ms:,.4g}" for who, ms in row.get("median_ms", {}).items()}


def _memory(row: Row) -> dict[str, str]:
    found = {}
    for who, peak in row.get("peak_mib", {}).items():
        peaks = peak.items() if isinstance(peak, dict) else [("", peak)]
        found |= {f"{who}, {at} tokens" if at else who: f"{mib:,.0f}" for at, mib in peaks}
    return found


def _errors(row: Row) -> dict[str, str]:
    return {
        f"{who}, {what}": f"{error:.1e}"
        for who, errors in row.get("relative_errors", {}).items()
        for what, error in errors.items()
    }


def _strayed(row: Row) -> dict[str, str]:
    return {who: f"{share:.3g}" for who, share in row.get("strayed_from_fp32", {}).items()}


def _packs(row: Row) -> dict[str, str]:
    names = {"ours": "packs", "TRL": "packs_trl", "at least": "packs_lower_bound"}
    return {who: f"{row[key]:,}" for who, key in names.items() if key in row}


def _efficiency(row: Row) -> dict[str, str]:
    return {"full": f"{row['efficiency']:.2%}"} if "efficiency" in row else {}


_VALUES: dict[str, Callable[[Row], dict[str, str]]] = {
    "times": _times,
    "ms": _milliseconds,
    "memory": _memory,
    "errors": _errors,
    "strayed": _strayed,
    "packs": _packs,
    "efficiency": _efficiency,
}
_KINDS = {
    "times": "rival's time / ours",
    "ms": "ms",
    "memory": "peak, MiB",
    "errors": "relative errors",
    "strayed": "strayed from fp32",
    "packs": "packs",
    "efficiency": "open packs",
}


def pages() -> Iterator[Path]:
    """Those that have tables of figures."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if _BLOCK.search(path.read_text()):
            yield path


def write() -> None:
    draw()
    PAGE.write_text(page())
    for path in pages():
        path.write_text(with_figures(path.read_text()))


if __name__ == "__main__":
    write()
