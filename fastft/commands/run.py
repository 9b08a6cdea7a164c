"""`python -m fastft run script.py args...`: an unchanged script trains with what fits of fastft.

Every Trainer gets `fastft.plug` when its `train()` is called, every plain loop with an Accelerator
the loss and AdamW at `prepare`. All else is as `python script.py args...` has it, and what fastft
has to say goes to stderr, from the main process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastft.commands.pieces import PIECES, packing_of, pieces_of
from fastft.commands.script import (
    Script,
    add_local_rank,
    execute,
    of_script,
    reason_against,
    split,
)
from fastft.commands.versions import loaded_versions
from fastft.integrations.processes_apart import is_first_started, processes_apart
from fastft.integrations.trainings import at_prepare, at_train

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer

    from fastft.integrations.accelerator_loop import AcceleratorLoop
    from fastft.integrations.plug.plug import Plugged

_NOTHING = (
    "nothing of fastft was used: this process trained no Trainer, and no Accelerator prepared a "
    "model or an optimizer. Processes that a script starts itself (spawn, Ray, notebook_launcher) "
    "train stock; start them with torchrun ... -m fastft run"
)


def main(arguments: list[str]) -> int:
    """Runs the script; returns 0 where it ends, and leaves `SystemExit` and errors to Python."""
    parser = _parser()
    own, script = split(arguments)
    options = parser.parse_args(own)
    reason = reason_against(script) or _reason_against(options)
    if script is None or reason is not None:
        parser.error(str(reason))
    script.arguments[:0] = options.local_rank
    run = _Run(options, script)
    with run.at_work():
        execute(script)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastft run",
        usage="%(prog)s [options] script.py [arguments]\n"
        "       %(prog)s [options] -m module [arguments]",
        description="Runs an unchanged script; every Trainer in it trains with fastft's loss and "
        "optimizer, and an Accelerator's loop likewise. Behind a launcher: torchrun ... -m fastft "
        "run script.py, accelerate launch -m fastft run script.py, deepspeed --module fastft run "
        "script.py. Processes that the script starts itself train stock.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--only",
        type=pieces_of,
        metavar="PIECES",
        help=f"some of {', '.join(PIECES)}, with commas between; without it, all that fit",
    )
    parser.add_argument(
        "--packing",
        type=packing_of,
        metavar="N|collate",
        help="pack the training set into rows of N tokens; or keep its batches, without padding",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write what was done, as JSON, at the end"
    )
    add_local_rank(parser)
    return parser


def _reason_against(options: argparse.Namespace) -> str | None:
    """Why these options cannot be meant; None if they can."""
    only = options.only or PIECES
    if options.only and "packing" in only and options.packing is None:
        return "--only packing needs --packing N, or --packing collate"
    if options.packing is not None and "packing" not in only:
        return f"--packing {options.packing} is left out by --only {','.join(only)}"
    if options.report is not None and not options.report.absolute().parent.is_dir():
        return f"--report: there is no folder {options.report.absolute().parent}"
    return None


@dataclasses.dataclass(eq=False)
class _Training:
    """What the report has of a Trainer, or of the Accelerator loops.

    `trainer`: the name of its class.
    `lines`: of each piece, the latest sentence.
    `report`, `evaluation`: as `fastft.FusedLossCallback` has them.
    """

    trainer: str
    lines: dict[str, str] = dataclasses.field(default_factory=dict)
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def look(self, source: Plugged | AcceleratorLoop) -> dict[str, str]:
        """Takes what `source` knows by now; returns the lines that are new."""
        before, self.lines = self.lines, dict(source.lines)
        self.report = dataclasses.asdict(source.report)
        self.evaluation = dataclasses.asdict(source.evaluation)
        return {piece: line for piece, line in self.lines.items() if line != before.get(piece)}


class _Run:
    """What becomes of the trainings in this process."""

    def __init__(self, options: argparse.Namespace, script: Script) -> None:
        wanted = options.only or PIECES
        self._packing, self._script = options.packing, script
        self._file = options.report and options.report.absolute()  # the script may change folders
        self._pieces = [piece for piece in wanted if piece != "packing" or self._packing]
        self._trainings: list[_Training] = []
        # weakly: a script that makes a Trainer for each fold must lose the last one
        self._trainers: weakref.WeakKeyDictionary[Trainer, _Training] = weakref.WeakKeyDictionary()
        self._ours: weakref.WeakSet[Trainer] = weakref.WeakSet()  # the script may plug some itself
        self._loop: tuple[AcceleratorLoop, _Training] | None = None
        self._process = os.getpid()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While the context is open, trainings that begin are fastft's; nothing remains behind."""
        error: BaseException | None = None
        try:
            with at_train(self._begin, self._end), at_prepare(self._given, self._prepared):
                yield
        except BaseException as raised:
            error = raised
            self._explain(raised)
            raise
        finally:
            self._close(error)

    def _begin(self, trainer: Trainer, resume: str | bool | None) -> None:
        from fastft.integrations.checkpoint_folder import check_checkpoints
        from fastft.integrations.plug.plug import Plugged, plug  # it imports transformers

        if trainer not in self._trainers:
            self._trainers[trainer] = _Training(type(trainer).__name__)
            self._trainings.append(self._trainers[trainer])
        if Plugged.of(trainer) is None:
            check_checkpoints(trainer, resume)  # as `train` of a plugged Trainer does
            loss, optimizer = "loss" in self._pieces, "optimizer" in self._pieces
            plug(trainer, loss=loss, optimizer=optimizer, packing=self._packing)
            self._ours.add(trainer)
        self._look(trainer)

    def _end(self, trainer: Trainer, error: BaseException | None) -> None:
        self._look(trainer)
        if error is not None:
            self._take_off(trainer)  # the script may catch it and train again

    def _look(self, trainer: Trainer) -> None:
        from fastft.integrations.plug.plug import Plugged

        plugged = Plugged.of(trainer)
        if plugged is not None:
            self._trainers[trainer].look(plugged)

    def _take_off(self, trainer: Trainer) -> None:
        from fastft.integrations.plug.plug import Plugged

        plugged = Plugged.of(trainer)
        if plugged is not None and trainer in self._ours:
            plugged.restore()

    def _given(self, accelerator: Accelerator, objects: tuple[Any, ...]) -> None:
        if self._loop is None:
            from fastft.integrations.accelerator_loop import AcceleratorLoop  # it imports torch

            self._loop = AcceleratorLoop(self._pieces), _Training("Accelerator")
            apart = processes_apart(accelerator.num_processes)
            if apart is not None and is_first_started():
                _say(str(apart))
        self._loop[0].before(accelerator, objects)

    def _prepared(self, accelerator: Accelerator, prepared: tuple[Any, ...]) -> None:
        if self._loop is not None:
            self._loop[0].after(accelerator, prepared)
            self._tell(accelerator.is_main_process)

    def _tell(self, aloud: bool) -> None:
        """Keeps what there is to say of the Accelerator loops, and says what is new."""
        if self._loop is None or not self._loop[0].is_at_work:
            return
        loop, training = self._loop
        if training not in self._trainings:
            self._trainings.append(training)
        for piece, line in training.look(loop).items():
            if aloud:
                _say(f"{piece}: {line}")

    def _close(self, error: BaseException | None) -> None:
        if os.getpid() != self._process:  # a process that the script has forked comes to its end
            return
        for trainer in self._trainers:
            self._look(trainer)
            self._take_off(trainer)
        if self._loop is not None:
            self._loop[0].restore()
            self._tell(is_first_started())
        if not is_first_started():
            return
        if not self._trainings and not _is_failure(error):
            _say(_NOTHING)
        if self._file is not None:
            self._file.write_text(json.dumps(self._report(error), indent=2) + "\n")

    def _report(self, error: BaseException | None) -> dict[str, Any]:
        script, failed = self._script, _is_failure(error)
        return {
            "script": [*["-m"][: script.is_module], script.target, *script.arguments],
            "pieces": self._pieces,
            "packing": self._packing,
            "trainings": list(map(dataclasses.asdict, self._trainings)),
            "error": f"{type(error).__name__}: {error}" if failed else None,
            "versions": loaded_versions(),
        }

    def _explain(self, error: BaseException) -> None:
        """Lets Python report the script's failure as its own, and adds a line where it may be
        fastft's."""
        line = self._way_out(error)
        if isinstance(error, SystemExit):  # Python prints no traceback behind which to say it
            if line is not None:
                _say(line)
            return
        report = sys.excepthook

        def excepthook(
            kind: type[BaseException], error: BaseException, traceback: TracebackType | None
        ) -> None:
            of_its_own = of_script(traceback)
            report(kind, error.with_traceback(of_its_own), of_its_own)
            if line is not None:
                _say(line)

        sys.excepthook = excepthook

    def _way_out(self, error: BaseException) -> str | None:
        """What to do about a failure that may be fastft's; None where nothing of it was at work."""
        if not self._trainings or not _is_failure(error) or isinstance(error, KeyboardInterrupt):
            return None
        one = " or ".join(f"--only {piece}" for piece in self._pieces)
        others = f"leave pieces out ({one}), and " if len(self._pieces) > 1 else ""
        return (
            f"fastft's {', '.join(self._pieces)} had a part in this training. If it does not fail "
            f"without `-m fastft run`, {others}please report it"
        )


def _is_failure(error: BaseException | None) -> bool:
    return error is not None and not (isinstance(error, SystemExit) and not error.code)


def _say(text: str) -> None:
    print(f"fastft: {text}", file=sys.stderr, flush=True)
