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
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastft.commands import children
from fastft.commands.compare_report import Comparison, show, write
from fastft.commands.pieces import PIECES, pieces_of
from fastft.commands.script import Script, reason_against, split
from fastft.commands.trace import Trace
from fastft.commands.verdict import judge, merged, unreproducible
from fastft.commands.yardstick import Runs

EQUAL, DIFFERENT, COULD_NOT_RUN = 0, 1, 2
_LOW_PRECISION = ("bfloat16", "float16")


_WITHOUT_DROPOUT = (
    "The script has dropout, whose masks are others where rows are packed, though the random "
    "numbers are the same: these runs are without dropout, and a further pair with dropout and "
    "without packing compares the random numbers."
)
_WITHOUT_PACKING = (
    "Packing is left out: the model draws random numbers, and not for dropout alone, which mean "
    "something else in packed rows."
)


class CouldNotRun(Exception):
    """Nothing was compared; the text says why."""


@dataclass(frozen=True)
class Request:
    """What was asked for.

    `pieces`: those that are to be run alone as well. `only`: those that the fast runs have.
    `packing`: tokens of a pack for the second table; None without it. `runs`: of stock and of fast,
    1 or 2.
    """

    script: Script
    steps: int
    only: tuple[str, ...]
    pieces: tuple[str, ...]
    packing: int | None
    runs: int
    launch: list[str]
    out: Path


def main(arguments: list[str]) -> int:
    """0: equal, 1: different, 2: could not run."""
    request = _parse(arguments)
    try:
        with children.ended_by_signals():
            comparison = compare(request)
            show(comparison, write(comparison, request.out))
    except CouldNotRun as why:
        print(f"fastft compare: {why}", file=sys.stderr)
        return COULD_NOT_RUN
    except KeyboardInterrupt:
        print("fastft compare: interrupted; nothing runs any more", file=sys.stderr)
        return 130
    except Exception:  # Python's own exit code for it is that of "different"
        traceback.print_exc()
        print("fastft compare: that is an error of its own: please report it", file=sys.stderr)
        return COULD_NOT_RUN
    return EQUAL if comparison.equal else DIFFERENT


def _parse(arguments: list[str]) -> Request:
    parser = argparse.ArgumentParser(
        prog="python -m fastft compare",
        usage="%(prog)s [options] script.py args...   or   %(prog)s [options] -m module args...",
        description="Trains with an unchanged script stock and with fastft by turns, on the same "
        "batches. Exit code 0: equal within stock's own noise, 1: different, 2: could not run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--steps", type=_positive, default=20, metavar="N", help="optimizer steps of a run (20)"
    )
    parser.add_argument(
        "--pieces",
        type=pieces_of,
        default=(),
        metavar="each",
        help="run each piece (loss, optimizer, packing) alone as well, or those named",
    )
    parser.add_argument(
        "--only",
        type=pieces_of,
        default=PIECES,
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
        "--runs", type=int, choices=(1, 2), default=2, help="of stock, and of fast, by turns (2)"
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
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {str(options.out)!r} is no folder")
    if script is None or why is not None:
        parser.error(why or "a script is missing")
    return Request(
        script,
        options.steps,
        options.only,
        options.pieces,
        options.packing,
        options.runs,
        _launcher(parser, options.launch),
        options.out,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {text!r}")
    return int(text)


def _launcher(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """The command that starts `-m module` in each of its processes; this Python without one."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        parser.error(f"argument --launch: {error} in {text!r}")
    if not words:
        return [sys.executable, "-m"]
    beside = Path(sys.executable).parent / words[0]  # this Python's own, on the PATH or not
    program = str(beside) if beside.exists() else shutil.which(words[0])
    if program is None:
        parser.error(f"argument --launch: there is no program {words[0]!r}")
    return [program, *words[1:], "--module" if Path(words[0]).name == "deepspeed" else "-m"]


@dataclass(frozen=True)
class _Run:
    """What all processes of a run recorded, and the file with what they printed."""

    trace: Trace
    log: Path

    @property
    def failed(self) -> bool:
        """Whether it did not train."""
        return self.trace.ended == "error" or not self.trace.steps

    @property
    def reason(self) -> str:
        """Why it did not, in a line."""
        return (self.trace.error or "it took no optimizer step").strip().splitlines()[-1]

    @property
    def output(self) -> str:
        """The end of what it printed, and where the rest is."""
        return f"The end of its output ({self.log}):\n{children.last_lines(self.log)}"


class _Session:
    """Makes the runs of one comparison, and says where one failed."""

    def __init__(self, request: Request, progress: children.Progress) -> None:
        self.request, self.progress, self.count = request, progress, 0
        self.only, self.dropout, self.notes = request.only, True, list[str]()

    def run(self, variant: str, name: str, only: Sequence[str] = (), packing: str = "") -> _Run:
        """Runs the script to its end or the last step."""
        request = self.request
        self.count += 1
        stem = f"{self.count}-{name.replace(' ', '-')}"
        file, log = request.out / f"{stem}.json", request.out / f"{stem}.log"
        for old in request.out.glob(f"{stem}*.json"):
            old.unlink()
        command = [*request.launch, "fastft.commands.recorded_script", "--out", str(file)]
        command += ["--variant", variant, "--steps", str(request.steps)]
        command += ["--only", ",".join(only)] if only else []
        command += ["--packing", packing] if packing else []
        command += [] if self.dropout else ["--dropout", "off"]
        self.progress.begin(name)
        begin = time.monotonic()
        code = children.run([*command, "--", *_words(request.script)], log, self.progress.watch)
        self.progress.end(time.monotonic() - begin)
        if not file.exists():
            error = f"it ended with exit code {code} before anything was recorded"
            return _Run(Trace(variant, ended="error", error=error), log)
        ranks = [Trace.load(one) for one in request.out.glob(f"{stem}*.json")]
        return _Run(merged(sorted(ranks, key=lambda trace: trace.rank)), log)

    def stock(self) -> Trace:
        """A run without fastft, which must train."""
        run = self.run("stock", "stock")
        if run.trace.ended == "error":
            raise CouldNotRun(
                f"the script fails without fastft already, so there is nothing to compare: "
                f"{run.reason}\n{run.output}"
            )
        if run.failed:
            raise CouldNotRun(
                f"the script ended without a single optimizer step of a transformers Trainer or an "
                f"accelerate Accelerator, so there is nothing to compare\n{run.output}"
            )
        return run.trace

    def fast(self, name: str = "fastft") -> Trace:
        """A run with fastft. One that fails is run with each piece alone, to name the guilty."""
        only = self.only
        run = self.run("fast", name, only, "collate" if "packing" in only else "")
        if not run.failed:
            return run.trace
        guilty = []
        if len(only) > 1:
            self.progress.add(len(only))
            guilty = [piece for piece in only if self.piece(piece).failed]
        others = ",".join(piece for piece in only if piece not in guilty)
        which = "No piece fails alone."
        if guilty:
            which = f"The {' and the '.join(guilty)} alone fails too"
            which += f": leave it out with --only {others}" if others else "."
        raise CouldNotRun(
            f"the script trains without fastft, and fails with it: {run.reason}\n"
            f"{which}\n{run.output}"
        )

    def reference(self, variant: str, name: str) -> Trace:
        """A stock run that says what a difference means; without it nothing can be said."""
        run = self.run(variant, name)
        if run.failed:
            raise CouldNotRun(
                f"the script trains without fastft, but not with {name}, by which its differences "
                f"are judged: {run.reason}\n{run.output}"
            )
        return run.trace

    def settle_dropout(self, stock: Trace) -> tuple[Trace, tuple[Trace, Trace] | None]:
        """Where the script has dropout and packing is on, the runs to come are without dropout:
        packed rows have another shape than padded ones, and the same random numbers are other masks
        in them. Where a model draws random numbers all the same, packing is left out.

        Args:
            stock: the first run.

        Returns:
            the first run to compare with, and a stock and a fast run which keep dropout, or None.
        """
        only, others = self.only, tuple(piece for piece in self.only if piece != "packing")
        if others == only or not _draws(stock):
            return stock, None
        self.progress.add(1 + bool(others))
        self.dropout = False
        still = self.stock()
        if _draws(still) and not others:
            raise CouldNotRun(
                "the model draws random numbers, and not for dropout alone: in packed rows they "
                "mean something else, so that packing has nothing to be compared with"
            )
        self.dropout, self.only = True, others
        if _draws(still):
            self.notes.append(_WITHOUT_PACKING)
            self.progress.add(-1)
            return stock, None
        pair = (stock, self.fast("fastft with dropout")) if others else None
        self.dropout, self.only = False, only
        self.notes.append(_WITHOUT_DROPOUT)
        return still, pair

    def piece(self, piece: str) -> _Run:
        """A run with one piece alone."""
        return self.run(piece, piece, [piece], "collate" if piece == "packing" else "")


def compare(request: Request) -> Comparison:
    """Makes all runs and judges them.

    Raises:
        CouldNotRun: the script does not train, with or without fastft, or not twice alike; or there
            is no place for the report.
    """
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CouldNotRun(f"--out: {request.out} cannot be a folder: {error.strerror}") from error
    begin = time.monotonic()
    packing, names = request.packing, request.pieces
    total = 2 * request.runs + 1 + len(names) + (packing is not None)
    with children.Progress(total) as progress:
        session = _Session(request, progress)
        first, dropout = session.settle_dropout(session.stock())
        half = first.dtype in _LOW_PRECISION
        progress.add(int(half))
        fast = [session.fast() for _ in range(request.runs)]
        stock = [first, *(session.stock() for _ in range(request.runs - 1))]
        noise = session.reference("noise", "noise")
        why = unreproducible([*stock, noise])
        if why is not None:
            raise CouldNotRun(why)
        fp32 = session.reference("fp32", "fp32 weights") if half else None
        runs = Runs(stock, fast, noise, fp32, dropout)
        verdict = judge(runs)
        if not verdict.equal and not names and len(session.only) > 1:
            names = session.only  # which of them is it?
            progress.add(len(names))
        pieces = {name: session.piece(name) for name in names}
        packs = None
        if packing is not None:
            packs = session.run("fast", f"packs of {packing}", request.only, str(packing)).trace
    return Comparison(
        command=shlex.join(_words(request.script)),
        launch=shlex.join(request.launch[:-1]) if request.launch[0] != sys.executable else "",
        runs=runs,
        verdict=verdict,
        pieces={name: run.trace for name, run in pieces.items() if not run.failed},
        failed={name: run.reason for name, run in pieces.items() if run.failed},
        packs=packs,
        packing=packing,
        notes=session.notes,
        seconds=time.monotonic() - begin,
    )


def _draws(trace: Trace) -> bool:
    return any(step.drew for step in trace.steps)


def _words(script: Script) -> list[str]:
    return [*(["-m"] if script.is_module else []), script.target, *script.arguments]
