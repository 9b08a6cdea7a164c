"""`python -m fastft compare script.py args...`: a training without and with fastft by turns, each
in a process of its own. Is it the same, and what does it save?

The runs: stock, fast, fast, stock (what a machine does meanwhile falls on both), stock with noise,
which is the yardstick (`yardstick.py`), stock with fp32 weights where the weights are bf16, pieces
alone, packs. `trace.py` is the child, `verdict.py` compares, `compare_report.py` says it.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastft.commands import children
from fastft.commands.compare_report import Comparison, show, write
from fastft.commands.script import Script, reason_against, split
from fastft.commands.trace import Trace
from fastft.commands.verdict import judge, merged, unreproducible
from fastft.commands.yardstick import Runs

EQUAL, DIFFERENT, COULD_NOT_RUN = 0, 1, 2
_PIECES = ("loss", "optimizer", "packing")
_LOW_PRECISION = ("bfloat16", "float16")


class CouldNotRun(Exception):
    """Nothing was compared; the text says why."""


@dataclass(frozen=True)
class Request:
    """What was asked for.

    `pieces`: those that are to be run alone as well. `only`: those that the fast runs have.
    `packing`: tokens of a pack for the second table; None without it.
    """

    script: Script
    steps: int
    only: tuple[str, ...]
    pieces: tuple[str, ...]
    packing: int | None
    launch: list[str]
    out: Path


def main(arguments: list[str]) -> int:
    """0: equal, 1: different, 2: could not run."""
    request = _parse(arguments)
    try:
        with children.ended_by_signals():
            comparison = compare(request)
    except CouldNotRun as why:
        print(f"fastft compare: {why}", file=sys.stderr)
        return COULD_NOT_RUN
    except KeyboardInterrupt:
        print("fastft compare: interrupted; nothing runs any more", file=sys.stderr)
        return 130
    files = write(comparison, request.out)
    show(comparison, files)
    return EQUAL if comparison.equal else DIFFERENT


def _parse(arguments: list[str]) -> Request:
    parser = argparse.ArgumentParser(
        prog="python -m fastft compare",
        usage="%(prog)s [options] script.py args...   or   %(prog)s [options] -m module args...",
        description="Trains with an unchanged script stock and with fastft by turns, on the same "
        "batches. Exit code 0: equal within stock's own noise, 1: different, 2: could "
        "not run.",
    )
    parser.add_argument(
        "--steps", type=_positive, default=20, metavar="N", help="optimizer steps of a run (20)"
    )
    parser.add_argument(
        "--pieces",
        type=_pieces,
        default=(),
        metavar="each",
        help="run each piece (loss, optimizer, packing) alone as well, or those named",
    )
    parser.add_argument(
        "--only",
        type=_pieces,
        default=_PIECES,
        metavar="PIECES",
        help="the pieces of the fast runs: loss,optimizer",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help='starts each run: "torchrun --nproc_per_node 2"',
    )
    parser.add_argument(
        "--packing",
        type=_positive,
        metavar="TOKENS",
        help="a second table: packs of so many tokens",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fastft-compare"),
        metavar="DIR",
        help="folder of report.md, report.json, report.png and the runs' output (fastft-compare)",
    )
    own, script = split(arguments)
    options = parser.parse_args(own)
    why = reason_against(script)
    if script is None or why is not None:
        parser.error(why or "a script is missing")
    return Request(
        script,
        options.steps,
        options.only,
        options.pieces,
        options.packing,
        _launcher(parser, options.launch),
        options.out,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {text!r}")
    return int(text)


def _pieces(text: str) -> tuple[str, ...]:
    if text == "each":
        return _PIECES
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in _PIECES:
            raise argparse.ArgumentTypeError(
                f"there is no piece {name!r}, only {', '.join(_PIECES)}, or each for all of them"
            )
    return names


def _launcher(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """The command that starts `-m module` in each of its processes; this Python without one."""
    words = shlex.split(text)
    if not words:
        return [sys.executable, "-m"]
    beside = Path(sys.executable).parent / words[0]  # a venv that is not on the PATH
    program = shutil.which(words[0]) or (str(beside) if beside.exists() else None)
    if program is None:
        parser.error(f"argument --launch: there is no program {words[0]!r}")
    return [program, *words[1:], "--module" if Path(words[0]).name == "deepspeed" else "-m"]


@dataclass
class _Session:
    """The runs of one comparison: makes them, and says where one failed."""

    request: Request
    progress: children.Progress
    count: int = 0
    logs: dict[int, Path] = field(default_factory=dict)

    def trace(self, variant: str, name: str, only: Sequence[str] = (), packing: str = "") -> Trace:
        """Runs the script to its end or the last step. What all processes recorded; `ended` says
        whether it failed."""
        request = self.request
        self.count += 1
        stem = request.out / f"{self.count}-{name.replace(' ', '-')}"
        file, log = stem.with_suffix(".json"), stem.with_suffix(".log")
        for old in request.out.glob(f"{stem.name}*.json"):
            old.unlink()
        command = [*request.launch, "fastft.commands.trace", "--out", str(file)]
        command += ["--variant", variant, "--steps", str(request.steps)]
        command += ["--only", ",".join(only)] if only else []
        command += ["--packing", packing] if packing else []
        command += ["--", *(["-m"] if request.script.is_module else []), request.script.target]
        self.progress.begin(name)
        begin = time.monotonic()
        code = children.run([*command, *request.script.arguments], log, self.progress.watch)
        self.progress.end(time.monotonic() - begin)
        files = sorted(request.out.glob(f"{stem.name}*.json"))
        if file not in files:
            error = f"it ended with exit code {code} before anything was recorded"
            trace = Trace(variant, ended="error", error=error)
        else:
            trace = merged(sorted(map(Trace.load, files), key=lambda one: one.rank))
        self.logs[id(trace)] = log
        return trace

    def stock(self) -> Trace:
        """A run without fastft, which must train."""
        trace = self.trace("stock", "stock")
        if trace.ended == "error":
            raise CouldNotRun(
                f"the script fails without fastft already, so there is nothing to compare: "
                f"{_reason(trace)}\n{self.output(trace)}"
            )
        if not trace.steps:
            raise CouldNotRun(
                f"the script ended without a single optimizer step of a transformers Trainer or an "
                f"accelerate Accelerator, so there is nothing to compare\n{self.output(trace)}"
            )
        return trace

    def fast(self) -> Trace:
        """A run with fastft. One that fails is run with each piece alone, to name the guilty."""
        only = self.request.only
        trace = self.trace("fast", "fastft", only, "collate")
        if trace.ended != "error" and trace.steps:
            return trace
        guilty = []
        if len(only) > 1:
            self.progress.add(len(only))
            alone = {piece: self.piece(piece) for piece in only}
            guilty = [p for p, run in alone.items() if run.ended == "error" or not run.steps]
        which = (
            f"The {' and the '.join(guilty)} alone fails too: leave it out with "
            f"--only {','.join(p for p in only if p not in guilty) or '(another piece)'}"
            if guilty
            else "No piece fails alone."
        )
        raise CouldNotRun(
            f"the script trains without fastft, and fails with it: {_reason(trace)}\n"
            f"{which}\n{self.output(trace)}"
        )

    def piece(self, piece: str) -> Trace:
        """A run with one piece alone."""
        return self.trace(piece, piece, [piece], "collate" if piece == "packing" else "")

    def reference(self, variant: str, name: str) -> Trace:
        """A stock run that says what a difference means; without it nothing can be said."""
        trace = self.trace(variant, name)
        if trace.ended == "error" or not trace.steps:
            raise CouldNotRun(
                f"the script trains without fastft, but not with {name}, by which its differences "
                f"are judged: {_reason(trace)}\n{self.output(trace)}"
            )
        return trace

    def output(self, trace: Trace) -> str:
        """The end of what a run printed, and where the rest is."""
        log = self.logs[id(trace)]
        return f"The end of its output ({log}):\n{children.last_lines(log)}"


def compare(request: Request) -> Comparison:
    """Makes all runs and judges them.

    Raises:
        CouldNotRun: the script does not train, with or without fastft, or not twice alike.
    """
    request.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    total = 5 + len(request.pieces) + (request.packing is not None)
    with children.Progress(total) as progress:
        session = _Session(request, progress)
        stock = [session.stock()]
        half = stock[0].dtype in _LOW_PRECISION
        progress.add(int(half))
        fast = [session.fast() for _ in range(2)]
        stock.append(session.stock())
        why = unreproducible(stock)
        if why is not None:
            raise CouldNotRun(why)
        noise = session.reference("noise", "noise")
        fp32 = session.reference("fp32", "fp32 weights") if half else None
        runs = Runs(stock, fast, noise, fp32)
        verdict = judge(runs)
        names = request.pieces
        if not verdict.equal and not names and len(request.only) > 1:
            names = request.only  # which of them is it?
            progress.add(len(names))
        pieces = {piece: session.piece(piece) for piece in names}
        packs = (
            session.trace("fast", f"packs of {request.packing}", request.only, str(request.packing))
            if request.packing is not None
            else None
        )
    return Comparison(
        command=shlex.join(
            [
                *(["-m"] if request.script.is_module else []),
                request.script.target,
                *request.script.arguments,
            ]
        ),
        launch=shlex.join(request.launch[:-1]) if request.launch[0] != sys.executable else "",
        runs=runs,
        verdict=verdict,
        pieces={name: run for name, run in pieces.items() if run.steps},
        failed={name: _reason(run) for name, run in pieces.items() if not run.steps},
        packs=packs,
        packing=request.packing,
        seconds=time.monotonic() - begin,
    )


def _reason(trace: Trace) -> str:
    lines = (trace.error or "it took no optimizer step").strip().splitlines()
    return lines[-1] if lines else "it took no optimizer step"
