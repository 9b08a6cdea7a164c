"""Benchmarks as tables of Markdown."""

from __future__ import annotations

from typing import Any

from ledger import ENDS, Ledger, last_line
from turns import FAILED

Row = dict[str, Any]


def rows_of(ledger: Ledger, part: str, stem: str | None = None) -> list[Row]:
    """What the cases of a part have found, with the name of each; nothing of those that have
    failed or measured nothing. `stem`: of the one file that is asked for."""
    rows = []
    for line in ledger.cases(part).values():
        path, _, case = line["case"].partition("::")
        asked = stem is None or path.endswith(f"test_{stem}.py")
        if asked and line["outcome"] == "passed" and line.get("found"):
            rows.append({"name": case.removeprefix("test_"), **line["found"]})
    return rows


def failures(ledger: Ledger, part: str) -> list[str]:
    """A sentence for each case that has not passed and was not skipped."""
    return [
        f"{line['case']} {line['outcome']}: {last_line(line.get('said', ''))}"
        for line in ledger.cases(part).values()
        if line["outcome"] in ENDS and line["outcome"] not in ("passed", "skipped")
    ]


def scatters(row: Row) -> bool:
    """Whether its times, or their ratios, lie so far apart that it has failed."""
    return bool(row.get("spread", 0.0) > FAILED)


def unsteady(rows: list[Row]) -> list[str]:
    """A sentence for each row that scatters so much that it has failed."""
    return [
        f"{row['name']}: quartiles {row['spread']:.0%} of the median apart, after "
        f"{row['attempts']} attempts"
        for row in rows
        if scatters(row)
    ]


def grid(header: list[str], lines: list[list[object]]) -> str:
    """A table; columns that are empty in every line are left out."""
    kept = [i for i in range(len(header)) if any(line[i] not in ("", None) for line in lines)]
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(str(line[i]) for i in kept)} |" for line in cells)


def table(rows: list[Row]) -> str:
    """Times; on a GPU also what the host takes to launch, which hides behind the device's time or
    does not."""
    header = ["row", "shape", "ours, ms", "IQR", "rival / ours (above 1: ours is faster)"]
    header += ["ours / bare work", "share of the bound", "GB/s", "host, ms"]
    lines: list[list[object]] = []
    for row in rows:
        if "median_ms" not in row:
            continue
        ratios = row["times_faster_than"].items()
        rivals = ", ".join(f"{name} {_ratio(ratio)}" for name, ratio in ratios)
        ours = row["median_ms"]["ours"]
        bound = f"{row['bound_ms'] / ours:.2f}" if "bound_ms" in row else ""
        spread = f"{row['spread']:.1%}" if "spread" in row else ""
        lines.append([row["name"], row.get("shape", ""), f"{ours:,.3f}", spread, rivals])
        lines[-1] += [row.get("times_the_bare_work", ""), bound]
        lines[-1] += [row.get("gigabytes_per_second", ""), row.get("host_ms", {}).get("ours", "")]
    return grid(header, lines) if lines else ""


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def exactness(rows: list[Row]) -> str:
    """Where it was measured, the error against float64, and memory, beside the time."""
    lines: list[list[object]] = []
    for row in rows:
        for who, errors in row.get("relative_errors", {}).items():
            found = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
            ms = row.get("median_ms", {}).get(who)
            lines.append([row["name"], who, "" if ms is None else f"{ms:,.1f}"])
            lines[-1] += [row.get("peak_mib", {}).get(who, ""), found]
    return grid(["row", "who", "ms", "peak, MiB", "relative errors"], lines) if lines else ""


def memory_growth(rows: list[Row]) -> str:
    """Peak memory by the number of tokens."""
    lines: list[list[object]] = []
    for row in rows:
        for who, peaks in row.get("peak_mib", {}).items():
            if isinstance(peaks, dict) and peaks:
                found = ", ".join(f"{tokens}: {peak}" for tokens, peak in peaks.items())
                lines.append([row["name"], who, found])
    return grid(["row", "who", "tokens: peak, MiB"], lines) if lines else ""
