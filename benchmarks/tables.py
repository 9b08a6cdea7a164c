"""Benchmarks as tables of Markdown."""

from __future__ import annotations

from typing import Any

from ledger import ENDS, Ledger, last_line

Row = dict[str, Any]


def rows_of(ledger: Ledger, part: str) -> list[Row]:
    """What the cases of a part have found, with the name of each; nothing of those that have
    failed."""
    lines = [line for line in ledger.cases(part).values() if line["outcome"] == "passed"]
    return [
        {"name": line["case"].partition("::")[2].removeprefix("test_"), **line.get("found", {})}
        for line in lines
    ]


def failures(ledger: Ledger, part: str) -> list[str]:
    """A sentence for each case that has not passed and was not skipped."""
    return [
        f"{line['case']} {line['outcome']}: {last_line(line.get('said', ''))}"
        for line in ledger.cases(part).values()
        if line["outcome"] in ENDS and line["outcome"] not in ("passed", "skipped")
    ]


def table(rows: list[Row]) -> str:
    """Times; on a GPU also what the host takes to launch, which hides behind the device's time or
    does not."""
    rows = [row for row in rows if "median_ms" in row]
    hosts = any("host_ms" in row for row in rows)
    header = [
        "benchmark",
        "ours, ms",
        "rival / ours (above 1: ours is faster)",
        "ours / bare work",
        "GB/s",
    ]
    header += ["host, ms"] if hosts else []
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        rivals = ", ".join(
            f"{name} {ratio:.2f}" for name, ratio in row["times_faster_than"].items()
        )
        bare, rate = row.get("times_the_bare_work", ""), row.get("gigabytes_per_second", "")
        cells = [row["name"], f"{row['median_ms']['ours']:.3f}", rivals, bare, rate]
        cells += [row.get("host_ms", {}).get("ours", "")] if hosts else []
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def exactness(rows: list[Row]) -> str:
    """Where it was measured, the error against float64, and memory, beside the time."""
    lines = []
    for row in rows:
        for who, errors in row.get("relative_errors", {}).items():
            found = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
            lines.append(
                f"| {row['name']} | {who} | {row['median_ms'][who]:.1f} | {row['peak_mib'][who]} | "
                f"{found} |"
            )
    header = ["| benchmark | who | ms | peak, MiB | relative errors |", "|---|---|---|---|---|"]
    return "\n".join([*header, *lines]) if lines else ""


def memory_growth(rows: list[Row]) -> str:
    """Peak memory by the number of tokens."""
    lines = []
    for row in rows:
        for who, peaks in row.get("peak_mib", {}).items():
            if isinstance(peaks, dict) and peaks:
                found = ", ".join(f"{tokens}: {peak}" for tokens, peak in peaks.items())
                lines.append(f"| {row['name']} | {who} | {found} |")
    return (
        "\n".join(["| benchmark | who | tokens: peak, MiB |", "|---|---|---|", *lines])
        if lines
        else ""
    )
