"""A script that is run once to be recorded: stock, with fastft, or as a reference.

The process ends behind the last step, so that nothing is evaluated, saved or pushed, and schedules
are those of the whole training. What the script would write into its `output_dir` goes beside the
trace, and is removed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import multiprocessing
import os
import platform
import shutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from fastft.commands.pieces import PIECES, packing_of, pieces_of
from fastft.commands.script import (
    Script,
    add_local_rank,
    execute,
    of_script,
    reason_against,
    split,
)
from fastft.commands.trace import VARIANTS, Trace
from fastft.commands.versions import loaded_versions
from fastft.integrations.trainings import at_prepare, at_train
from fastft.on_import import when_imported

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer

    from fastft.integrations.accelerator_loop import AcceleratorLoop
    from fastft.integrations.recorder.recorder import RecordedLoop, Recorder

_REFERENCES = ("stock", "noise", "fp32")


def main(arguments: list[str]) -> int:
    """Runs a script and records its training; the process ends behind the last step."""
    parser = _parser()
    own, script = split(arguments)
    options = parser.parse_args(own)
    reason = reason_against(script)
    if script is None or reason is not None:
        parser.error(str(reason))
    script.arguments[:0] = options.local_rank
    pieces = (options.variant,) if options.variant in PIECES else options.only
    packing = options.packing if "packing" in pieces else None
    return RecordedScript(
        script,
        options.out,
        options.variant,
        options.steps,
        pieces,
        packing,
        dropout=options.dropout == "on",
    ).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastft.commands.recorded_script",
        usage="%(prog)s --out FILE [options] -- script.py [arguments]",
        description="One run of `python -m fastft compare`, in a process of its own.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="the file that gets the trace")
    parser.add_argument("--variant", choices=VARIANTS, default="fast")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (20)")
    parser.add_argument("--only", type=pieces_of, default=PIECES, help="pieces, commas between")
    parser.add_argument("--packing", type=packing_of, help="tokens, or 'collate'")
    parser.add_argument("--dropout", choices=("on", "off"), default="on")
    add_local_rank(parser)
    return parser


class RecordedScript:
    """One run of a script in this process.

    Args:
        script: what is run.
        out: the file that gets the trace of the first process; others have `.rankN` in its name.
        variant: as `Trace.variant` has it.
        steps: optimizer steps until the process ends.
        pieces: of fastft, those that are on.
        packing: as of `fastft.plug`.
        dropout: whether the model keeps its own.
    """

    def __init__(
        self,
        script: Script,
        out: Path,
        variant: str,
        steps: int,
        pieces: tuple[str, ...],
        packing: int | str | None,
        dropout: bool = True,
    ) -> None:
        rank = int(os.environ.get("RANK", "0"))
        self.out = out if rank == 0 else out.with_suffix(f".rank{rank}{out.suffix}")
        self.folder = out.with_suffix(".output")  # of all processes: one may write for the others
        self._script, self._steps, self._packing = script, steps, packing
        self._pieces = () if variant in _REFERENCES else pieces
        self.trace = Trace(variant, rank, int(os.environ.get("WORLD_SIZE", "1")))
        self._fast_loop: AcceleratorLoop | None = None
        self._recorder: Recorder | None = None
        self._loop: RecordedLoop | None = None
        self._changed: Any = None  # the model
        self._exact: Any = None  # the library of exact sums, which works while it is kept
        self._dropout = dropout
        self._work = contextlib.ExitStack()

    def run(self) -> int:
        """Runs the script until the last step, where the process ends, or its own end.

        Returns:
            the exit code of a script that has ended before: its own, or 1 for an exception, which
            is printed.
        """
        code = 0
        with self._work as work:
            work.callback(when_imported("transformers.training_args", self._keep_to_itself))
            work.enter_context(at_train(self._begin, self._end))
            work.enter_context(at_prepare(self._before, self._after))
            try:
                execute(self._script)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if code:
                    self.trace.error = f"the script ended with exit code {code}"
            except Exception as error:
                code = 1
                of_its_own = of_script(error.__traceback__)
                said = traceback.format_exception(type(error), error, of_its_own)
                self.trace.error = "".join(said)
                print(self.trace.error, file=sys.stderr)
        if self._recorder is not None:
            self._recorder.complete()
        self.trace.ended = "error" if self.trace.error else "script"
        self._save()
        return code

    def _keep_to_itself(self, module: ModuleType) -> None:
        """Has the arguments of every Trainer write to `folder` and report to nobody."""
        stock = module.TrainingArguments.__post_init__

        @functools.wraps(stock)
        def __post_init__(arguments: Any) -> None:
            arguments.output_dir, arguments.report_to = str(self.folder), "none"
            arguments.push_to_hub = False
            stock(arguments)

        module.TrainingArguments.__post_init__ = __post_init__
        self._work.callback(setattr, module.TrainingArguments, "__post_init__", stock)

    def _begin(self, trainer: Trainer, resume: str | bool | None) -> None:
        """A Trainer is going to train; the latest is the one that is recorded."""
        from fastft.integrations.recorder.recorder import record

        self.trace.error = None
        self._change(trainer.model, trainer.accelerator)
        record(trainer, self._new_recorder(self._plugged(trainer)))

    def _end(self, trainer: Trainer, error: BaseException | None) -> None:
        """A training has failed, which the script may catch, to train again."""
        from fastft.integrations.recorder.recorder import RecorderCallback

        trainer.remove_callback(RecorderCallback)
        if self._pieces:
            self._plugged(trainer).restore()
        if error is not None:
            of_it = traceback.format_exception(type(error), error, error.__traceback__)
            self.trace.error = "".join(of_it)

    def _plugged(self, trainer: Trainer) -> Any:
        """What plug made of a Trainer, now or in the script; None for a stock run."""
        if not self._pieces:
            return None
        from fastft.integrations.plug.plug import Plugged, plug

        loss, optimizer = "loss" in self._pieces, "optimizer" in self._pieces
        return Plugged.of(trainer) or plug(
            trainer, loss=loss, optimizer=optimizer, packing=self._packing
        )

    def _before(self, accelerator: Accelerator, objects: tuple[Any, ...]) -> None:
        """A loop of the script's own prepares something."""
        from fastft.integrations.recorder.recorder import models_of

        for model in models_of(objects):
            self._change(model, accelerator)
        if self._fast_loop is None and self._pieces:
            from fastft.integrations.accelerator_loop import AcceleratorLoop

            self._fast_loop = AcceleratorLoop([p for p in self._pieces if p != "packing"])
        if self._fast_loop is not None:
            self._fast_loop.before(accelerator, objects)

    def _after(self, accelerator: Accelerator, prepared: tuple[Any, ...]) -> None:
        from fastft.integrations.recorder.recorder import RecordedLoop

        if self._fast_loop is not None:
            self._fast_loop.after(accelerator, prepared)
        if self._loop is None:
            self._loop = RecordedLoop(self._new_recorder(self._fast_loop))
        self._loop.prepared(accelerator, prepared)

    def _new_recorder(self, plugged: Any) -> Recorder:
        from fastft.integrations.recorder.recorder import Recorder

        if self._recorder is not None:
            self._recorder.close()
        self._recorder = Recorder(self.trace, self._steps, self._leave)
        self._recorder.plugged = plugged
        return self._recorder

    def _change(self, model: Any, accelerator: Accelerator) -> None:
        """Makes the model what the variant asks for, once."""
        if model is self._changed:
            return
        self._changed = model
        if not self._dropout:
            from fastft.integrations.without_dropout import switch_off_dropout

            switch_off_dropout(model)
        if self.trace.variant in ("noise", "fp32"):
            from fastft.integrations.reference_runs import add_noise, sum_exactly, train_in_fp32

            if self.trace.variant == "fp32":
                train_in_fp32(model, accelerator)
            else:
                self.trace.noise = f"{add_noise(model)}; log-softmax in float64"
                self._exact = self._exact or sum_exactly()

    def _save(self) -> None:
        self.trace.versions = loaded_versions()
        self.trace.machine = _machine()
        self.trace.save(self.out)
        if self.trace.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _leave(self) -> NoReturn:
        """Ends the process, with all others of the training."""
        import torch  # not before the script, which may have something to say first

        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # nobody is waited for in vain
        self._save()
        for worker in multiprocessing.active_children():
            worker.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the script's own end would evaluate, save and push


def _machine() -> dict[str, str]:
    machine = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        machine["memory"] = f"{size / 2**30:.0f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None:
        machine["threads"] = str(torch.get_num_threads())
    if torch is not None and torch.cuda.is_available():
        machine["device"] = torch.cuda.get_device_name()
    return machine


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    # the script becomes __main__: what it pickles or imports must find this room under its name
    sys.exit(importlib.import_module("fastft.commands.recorded_script").main(sys.argv[1:]))
