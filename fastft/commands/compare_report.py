"""What `compare` says: Markdown to paste into an issue, JSON, a picture, the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastft.commands.children import in_words
from fastft.commands.figures import LIBRARIES, Figures, Interval, figures
from fastft.commands.trace import Trace
from fastft.commands.verdict import Verdict, judge
from fastft.commands.yardstick import Measured, Runs

_ROWS = 20  # of steps in the terminal

Section = tuple[str, list[str], list[list[str]]]


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, and what came of them.

    Attributes:
        command: the script and its arguments.
        launch: what started it, "" for one process.
        runs: stock, fast, and the yardstick's.
        verdict: of `runs`.
        pieces: runs with one piece alone, by its name.
        failed: why a piece alone did not train.
        packs: the run on packs of `packing` tokens.
        notes: what there is to say of the runs themselves.
        seconds: all of it took.
    """

    command: str
    launch: str
    runs: Runs
    verdict: Verdict
    pieces: dict[str, Trace] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    packs: Trace | None = None
    packing: int | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether the training with fastft is the one without."""
        return self.verdict.equal

    @cached_property
    def stock(self) -> Figures:
        """What stock took."""
        return figures(self.runs.stock)

    @cached_property
    def fast(self) -> Figures:
        """What it took with fastft."""
        return figures(self.runs.fast, self.runs.stock)

    @cached_property
    def alone(self) -> dict[str, tuple[Verdict, Figures]]:
        """Each piece that was run alone."""
        return {
            name: (
                judge(dataclasses.replace(self.runs, fast=[run], dropout=None)),
                figures([run], self.runs.stock),
            )
            for name, run in self.pieces.items()
        }

    @property
    def packed(self) -> Figures | None:
        """What the run on packs took; None without one that trained."""
        if self.packs is None or not self.packs.steps:
            return None
        return figures([self.packs], self.runs.stock)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes report.md, report.json and, with matplotlib, report.png into a folder that is there;
    returns their paths."""
    files = [folder / "report.md", folder / "report.json"]
    files[0].write_text(markdown(comparison))
    files[1].write_text(json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n")
    with contextlib.suppress(ImportError):
        from fastft.commands.compare_picture import draw

        draw(comparison, folder / "report.png")
        files.append(folder / "report.png")
    return files


def show(comparison: Comparison, files: Sequence[Path]) -> None:
    """Prints the answer, the figures, and where the rest is."""
    heads, rows = _per_step(comparison)
    every = -(-len(rows) // _ROWS)
    sections = [*_sections(comparison), ("Steps", heads[:6], [row[:6] for row in rows[::every]])]
    deeds = ["", "What fastft did:", *_deeds(comparison.runs.fast[0])]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join([*_answer(comparison), *_tables(sections), *deeds]))
    else:
        console = Console()
        for line in _answer(comparison):
            style = None if comparison.equal else "red"
            console.print(line.replace("**", ""), style=style, markup=False, highlight=False)
        for title, heads, rows in sections:
            table = Table(title=title or None, title_justify="left")
            for number, head in enumerate(heads):
                table.add_column(head, justify="left" if number == 0 else "right")
            for row in rows:
                table.add_row(*(cell.replace("**", "") for cell in row))
            console.print(table)
        console.print("\n".join(deeds), markup=False, highlight=False)
    print(f"\nIn {in_words(comparison.seconds)}. Written: {', '.join(map(str, files))}")
    if not any(file.suffix == ".png" for file in files):
        print("With matplotlib installed there is a picture as well.")


def markdown(comparison: Comparison) -> str:
    """The report, its short part first."""
    runs = comparison.runs
    fast, stock = runs.fast[0], runs.stock[0]
    lines = [
        f"### fastft compare: {_headline(comparison)}",
        "",
        *_answer(comparison),
        *_tables(_sections(comparison)),
        "",
        f"`{comparison.command}`{f' under `{comparison.launch}`' if comparison.launch else ''}: "
        f"{runs.length} optimizer steps of {stock.trainer} with {stock.model} "
        f"({_dtypes(stock)}; {stock.optimizer} in stock, {fast.optimizer} with fastft), "
        f"{len(runs.stock)} + {len(runs.fast)} runs by turns, "
        f"{'one process' if stock.world == 1 else f'{stock.world} processes'} each.",
        "",
        "#### What fastft did",
        "",
        *_deeds(fast),
        "",
        *_details(
            "Loss, gradient norm and weights of each step, against stock's noise",
            _table(*_per_step(comparison)),
        ),
        "",
        *_details("How this was measured", _how(comparison)),
        "",
        *_details("Versions and machine", _machine(stock)),
    ]
    return "\n".join(lines) + "\n"


def _headline(comparison: Comparison) -> str:
    speed = comparison.fast.speedup
    assert speed is not None
    if not comparison.equal:
        cause = comparison.verdict.cause
        return f"not the same training ({cause.what if cause else ''})"
    return f"the same training, {speed.value:.2f}x as fast"


def _answer(comparison: Comparison) -> list[str]:
    verdict, length = comparison.verdict, comparison.runs.length
    notes = [line for note in (*comparison.notes, *verdict.notes) for line in ("", note)]
    if verdict.equal:
        bits = verdict.same_bits
        same = (
            f" After {'each' if bits == length else f'the first {bits}'} the weights have its bits."
        )
        return [
            f"**Equal.** In all {length} steps the losses, the gradients, the updates and each "
            f"parameter's weights are stock's, as far as rounding lets stock be itself."
            f"{same if bits else ''} In the first step a loss that is off by "
            f"{verdict.sensitivity:.1g} of its size would have been seen.",
            *notes,
        ]
    first, *rest = verdict.findings
    lines = [f"**Different: {first.what}** (step {first.step}). {_sentence(first.sentence)}"]
    if rest:
        lines += ["", "Then, as its consequence or besides:", ""]
        lines += [f"* {f.what} (step {f.step}): {f.sentence}" for f in rest]
    guilty = [name for name, (alone, _) in comparison.alone.items() if not alone.equal]
    if guilty:
        lines += ["", f"It comes with {' and with '.join(f'{name} alone' for name in guilty)}."]
    elif comparison.alone and first.what != "random numbers":  # pieces alone draw none
        lines += ["", "No piece alone differs: it comes with their combination."]
    return [*lines, *notes]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _sections(comparison: Comparison) -> Iterator[Section]:
    """Title, heads and rows of each table."""
    stock, fast = comparison.stock, comparison.fast
    yes = "**yes**" if comparison.equal else f"**no: {comparison.verdict.findings[0].what}**"
    rows = [["equal", "", yes, ""], *_rows(stock, fast)]
    yield "", ["", "stock", "fastft", "fastft / stock"], rows
    if comparison.alone or comparison.failed:
        heads = ["piece alone", "equal", "tokens/s", "against stock", "peak memory", "padding"]
        rows = [
            [
                name,
                "yes" if verdict.equal else f"**no: {verdict.findings[0].what}**",
                f"{one.tokens_per_second.value:,.0f}",
                _times(one.speedup),
                _bytes(one.peak),
                f"{one.padding:.0%}",
            ]
            for name, (verdict, one) in comparison.alone.items()
        ]
        rows += [[name, f"fails: {why}", "", "", "", ""] for name, why in comparison.failed.items()]
        yield "What each piece brings", heads, rows
    if comparison.packs is not None:
        packed = comparison.packed
        heads = ["", "stock", f"packs of {comparison.packing}", "packs / stock"]
        rows = (
            [*_rows(stock, packed), *_per_pack(comparison)]
            if packed is not None
            else [["trained", "", f"no: {_last(comparison.packs.error)}", ""]]
        )
        yield "Packs: other batches, whose losses are not stock's step by step", heads, rows


def _rows(stock: Figures, fast: Figures) -> list[list[str]]:
    speed = fast.speedup
    rows = [
        ["tokens/s", _rate(stock.tokens_per_second), _rate(fast.tokens_per_second), _times(speed)],
        [
            "supervised tokens/s",
            _rate(stock.supervised_per_second),
            _rate(fast.supervised_per_second),
            "",
        ],
        [
            "peak memory",
            _bytes(stock.peak),
            _bytes(fast.peak),
            f"{fast.peak / stock.peak:.2f}x" if stock.peak_tells else "too small to measure",
        ],
        ["padding", f"{stock.padding:.0%}", f"{fast.padding:.0%}", ""],
        ["ignored labels", f"{stock.ignored:.0%}", f"{fast.ignored:.0%}", ""],
    ]
    if not stock.tokens_per_second.value:  # no tokens: images, say
        rows[:2] = [["steps/s", "", "", _times(speed)]]
    return rows


def _per_pack(comparison: Comparison) -> list[list[str]]:
    assert comparison.packs is not None
    sides = [comparison.runs.stock[0], comparison.packs]
    means = [sum(step.tokens for step in run.steps) / len(run.steps) for run in sides]
    losses = [sum(step.loss for step in run.steps) / len(run.steps) for run in sides]
    return [
        [
            "tokens a step",
            *(f"{mean:,.0f}" for mean in means),
            f"{means[1] / (means[0] or 1):.2f}x",
        ],
        ["mean loss of these steps", *(f"{loss:.4f}" for loss in losses), ""],
    ]


def _tables(sections: Iterable[Section]) -> list[str]:
    lines: list[str] = []
    for title, heads, rows in sections:
        lines += ["", f"#### {title}", ""] if title else [""]
        lines += _table(heads, rows)
    return lines


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def _deeds(fast: Trace) -> list[str]:
    lines = [
        f"* {line if line.startswith(name) else f'{name}: {line}'}"
        for name, line in fast.lines.items()
    ]
    lines.append(f"* losses fused: {fast.fused}")
    lines += [f"* logits were built for {place}" for place in fast.materialised]
    lines += [f"* left as it is: {why}" for why in fast.skipped]
    return lines


def _details(title: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>"]


def _per_step(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of steps."""
    loss, norm = comparison.verdict.loss, comparison.verdict.grad_norm
    weights = comparison.verdict.weights
    heads = ["step", "loss, stock", "loss, fastft", "off by", "noise", "allowed"]
    heads += ["gradient norm, stock", "off by", "noise", "allowed"] if norm else []
    heads += ["weights off by", "noise"] if weights else []
    rows = []
    for t in range(len(loss.stock)):
        row = [str(t + 1), f"{loss.stock[t]:.6f}", f"{loss.fast[t]:.6f}", *_off(loss, t)]
        row += [f"{norm.stock[t]:.6g}", *_off(norm, t)] if norm else []
        row += [f"{side[t]:.1e}" for side in weights] if weights else []
        rows.append(row)
    return heads, rows


def _off(measured: Measured, t: int) -> list[str]:
    off, noise, allowed = (
        f"{side[t]:.1e}" for side in (measured.difference, measured.noise, measured.allowed)
    )
    return [f"**{off}**" if measured.over[t] else off, noise, allowed]


def _how(comparison: Comparison) -> list[str]:
    noise = comparison.runs.noise
    turns = "stock, fastft" + ", fastft, stock" * (len(comparison.runs.stock) > 1)
    lines = [
        f"The runs are in turns ({turns}), each in a process of its own, with "
        "the same seeds and batches. The yardstick of a number is the larger of stock against "
        "stock, and stock against itself with one ulp of noise"
        + (f" ({noise.noise})" if noise is not None and noise.noise else "")
        + ": fastft may be off by 8 times its running maximum (16 times for the numbers of single "
        "parameters), plus what a sum rounds.",
        "Tokens a second are without padding and without the first two steps of a run; the "
        "interval is 95 % of a bootstrap over steps, and holds each run's own figure.",
    ]
    lines.append(f"Peak memory is that of one process: {comparison.fast.peak_kind}.")
    if not comparison.stock.peak_tells:
        lines.append(
            f"Below {_bytes(LIBRARIES)} it is too small to measure: what libraries keep in a "
            "process (imports, buffers, kernels for each shape) may be as much."
        )
    return [f"* {line}" for line in lines]


def _machine(trace: Trace) -> list[str]:
    return [f"* {name}: {value}" for name, value in {**trace.versions, **trace.machine}.items()]


def _dtypes(trace: Trace) -> str:
    autocast = trace.compute_dtype and trace.compute_dtype != trace.dtype
    return f"{trace.dtype} weights{f', autocast to {trace.compute_dtype}' if autocast else ''}"


def _rate(interval: Interval) -> str:
    return f"{interval.value:,.0f} ({interval.low:,.0f} to {interval.high:,.0f})"


def _times(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.value:.2f}x ({interval.low:.2f} to {interval.high:.2f})"


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _last(text: str | None) -> str:
    return (text or "it took no step").strip().splitlines()[-1]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that the report has, as plain values; a number that is none is null."""
    runs, stock = comparison.runs, comparison.runs.stock[0]
    content = {
        "command": comparison.command,
        "launch": comparison.launch,
        "equal": comparison.equal,
        "cause": comparison.verdict.cause and comparison.verdict.cause.what,
        "steps": runs.length,
        "verdict": dataclasses.asdict(comparison.verdict),
        "stock": dataclasses.asdict(comparison.stock),
        "fastft": dataclasses.asdict(comparison.fast),
        "pieces": {
            name: {"verdict": dataclasses.asdict(verdict), "figures": dataclasses.asdict(one)}
            for name, (verdict, one) in comparison.alone.items()
        },
        "failed": comparison.failed,
        "packing": comparison.packing,
        "packs": comparison.packed and dataclasses.asdict(comparison.packed),
        "losses": {
            name: [step.loss for step in run.steps] for name, run in _named_runs(comparison).items()
        },
        "lines": runs.fast[0].lines,
        "fused": runs.fast[0].fused,
        "materialised": runs.fast[0].materialised,
        "skipped": runs.fast[0].skipped,
        "trainer": stock.trainer,
        "model": stock.model,
        "dtype": stock.dtype,
        "processes": stock.world,
        "versions": stock.versions,
        "machine": stock.machine,
        "seconds": comparison.seconds,
    }
    cleaned: dict[str, Any] = _finite(content)
    return cleaned


def _named_runs(comparison: Comparison) -> dict[str, Trace]:
    runs = comparison.runs
    named = {f"stock {number}": run for number, run in enumerate(runs.stock, 1)}
    named |= {f"fastft {number}": run for number, run in enumerate(runs.fast, 1)}
    others = {
        "noise": runs.noise,
        "fp32": runs.fp32,
        "packs": comparison.packs,
        **comparison.pieces,
    }
    return named | {name: run for name, run in others.items() if run is not None}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
