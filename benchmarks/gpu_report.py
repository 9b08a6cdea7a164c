"""The tables of `make gpu-check`, from the lines that are there: what each part came to, estimates,
times, failures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ledger import ENDS, Ledger
from tables import exactness, failures, memory_growth, rows_of, table

_SENTENCES, _SENTENCE = 25, 200  # how many about failures, and their length
KERNELS = Path(__file__).resolve().parent / "results" / "kernels.md"


class Estimate(NamedTuple):
    """A row of kernels.md: the words of its heading and its cells, and the milliseconds by the name
    of a card."""

    words: frozenset[str]
    cards: dict[str, float]


def estimates(path: Path = KERNELS) -> list[Estimate]:
    """The rows of all tables of `path` that have a column of estimates; none where there is no such
    file."""
    found: list[Estimate] = []
    heading, column = "", None
    for line in path.read_text().splitlines() if path.exists() else []:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("#"):
            heading, column = line.strip("# "), None
        elif not line.startswith("|"):
            column = None
        elif column is None:
            column = next((i for i, cell in enumerate(cells) if "estimate" in cell.lower()), -1)
        elif (
            0 <= column < len(cells)
        ):  # e.g. "8,192 rows: H200 1.94 (instructions), H100 2.57 (memory)"
            cards = re.findall(r"\b([A-Z]+\d+\w*) ([\d,]*\d(?:\.\d+)?)", cells[column])
            by_card = {card: float(number.replace(",", "")) for card, number in cards}
            found.append(Estimate(_words(", ".join([heading, *cells])), by_card))
    return found


def estimate_of(kernel: str, gpu: str, known: list[Estimate]) -> float | None:
    """Of a kernel by its name, whose words the row must have, on a card that the GPU's name
    names."""
    wanted = _words(kernel)
    fitting = [row.cards for row in known if wanted <= row.words]
    return next(
        (ms for cards in fitting for card, ms in cards.items() if card in re.split(r"[\s-]", gpu)),
        None,
    )


def _words(text: str) -> frozenset[str]:
    """What commas, colons and brackets divide; 8,192 is one word."""
    return frozenset(
        word.strip(" `*").lower()
        for word in re.split(r",(?!\d)|[;:|()]", text)
        if word.strip(" `*")
    )


def summary(ledger: Ledger) -> str:
    """What matters of it, the short tables last: failures, parts, estimates beside times,
    trainings."""
    parts = [_wrong(ledger), _parts(ledger), _smoke(ledger), _training(ledger)]
    return "\n\n".join(filter(None, parts))


def write(stem: Path, ledger: Ledger) -> None:
    """All of it: <stem>.md, whole or not at all."""
    facts = _facts(ledger)
    described = [f"* {key}: {value}" for key, value in facts.items() if key != "packages"]
    packages = ", ".join(
        f"{name} {version or '(none)'}" for name, version in facts.get("packages", {}).items()
    )
    rows = rows_of(ledger, "ops")
    benchmarks = [table(rows), exactness(rows), memory_growth(rows)] if rows else []
    parts = [
        f"# {facts.get('gpu')}",
        "Made by `make gpu-check`.",
        "\n".join([*described, f"* packages: {packages}"]),
    ]
    parts += [summary(ledger), "## Benchmarks" if rows else "", *benchmarks]
    path = stem.with_name(f"{stem.name}.md")
    part = path.with_suffix(".part")
    part.write_text("\n\n".join(filter(None, parts)) + "\n")
    part.replace(path)


def _facts(ledger: Ledger) -> dict[str, Any]:
    return next((line["facts"] for line in ledger.lines() if "facts" in line), {})


def _parts(ledger: Ledger) -> str:
    lines = ["| part | seconds | of | cases | |", "|---|---|---|---|---|"]
    for line in ledger.lines():
        if "took" in line:
            outcomes = [case["outcome"] for case in ledger.cases(line["part"]).values()]
            counted = ", ".join(f"{outcomes.count(end)} {end}" for end in ENDS if end in outcomes)
            lines.append(
                f"| {line['part']} | {line['took']} | {line['limit']:.0f} | {counted} | "
                f"{line['why']} |"
            )
    return "\n".join(lines)


def _smoke(ledger: Ledger) -> str:
    known, gpu = estimates(), str(_facts(ledger).get("gpu"))
    lines = [
        "| kernel | measured, ms | at least (estimate), ms | measured / estimate |",
        "|---|---|---|---|",
    ]
    ceilings = ""
    for line in ledger.cases("smoke").values():
        found = line.get("found", {})
        if "tera_flop_s" in found:
            ceilings = (
                f"This machine multiplies at {found['tera_flop_s']} TFLOP/s, copies at "
                f"{found['giga_byte_s']} GB/s."
            )
        if "kernel" in found:
            guess = estimate_of(found["kernel"], gpu, known)
            ratio = f"{found['ms'] / guess:.2f}" if guess else ""
            name = found["kernel"] + (
                "" if line["outcome"] == "passed" else f" ({line['outcome']})"
            )
            lines.append(f"| {name} | {found['ms']} | {'' if guess is None else guess} | {ratio} |")
    if not known:
        ceilings += " Without estimates: there is no results/kernels.md."
    return (
        "\n\n".join(filter(None, ["## Kernels", ceilings.strip(), "\n".join(lines)]))
        if len(lines) > 2
        else ceilings
    )


def _training(ledger: Ledger) -> str:
    cases = ledger.cases("train").values()
    if not cases:
        return ""
    lines = [
        "## Training",
        "",
        "| | tokens / s | peak, MiB | first and last loss | |",
        "|---|---|---|---|---|",
    ]
    for line in cases:
        found, said = line.get("found", {}), line.get("said", "")
        losses = found.get("losses", [])
        ends = f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else ""
        cells = [line["case"], found.get("tokens_per_second", ""), found.get("peak_mib", ""), ends]
        lines.append(
            f"| {' | '.join(map(str, cells))} | {line['outcome']}{f': {said}' if said else ''} |"
        )
    return "\n".join(lines)


def _wrong(ledger: Ledger) -> str:
    parts = dict.fromkeys(line["part"] for line in ledger.lines() if "part" in line)
    wrong = [sentence[:_SENTENCE] for part in parts for sentence in failures(ledger, part)]
    if len(wrong) > _SENTENCES:
        wrong[_SENTENCES:] = [f"and {len(wrong) - _SENTENCES} more, in {ledger.path.name}"]
    return (
        "\n".join(["## Not as it should be", "", *(f"* {sentence}" for sentence in wrong)])
        if wrong
        else ""
    )
