"""`python -m fastft doctor`: what is slow or wrong, and says nothing.

Without an argument it looks at the machine; with a model, at its configuration; with a script, at
the Trainer whose `train()` the script calls first, its model, arguments and first batches. The
checks are in `fastft/integrations/doctor/`; docs/doctor.md lists them.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fastft.commands.script import Script, execute, reason_against, split
from fastft.integrations.doctor.finding import SEVERITIES, Finding, examined
from fastft.integrations.doctor.machine import MACHINE, this_machine

if TYPE_CHECKING:
    from transformers import Trainer

WRONG, NO_ANSWER = 1, 2
_WIDTH = 96


def main(arguments: list[str]) -> int:
    """Prints the findings; returns 1 where one of them is wrong, 2 where nothing could be looked
    at, else 0."""
    own, target = split(arguments)
    _parser().parse_args(own)
    if target is None:
        machine = this_machine()
        return report(f"This machine: {machine}", examined(MACHINE, machine), len(MACHINE))
    if _is_script(target):
        reason = reason_against(target)
        return _cannot(reason) if reason else _script(target)
    if target.arguments:
        return _cannot(f"a model has no arguments, got {' '.join(target.arguments)!r}")
    return _model(target.target)


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="python -m fastft doctor",
        usage="python -m fastft doctor [model | script.py args ... | -m module args ...]",
        description="Says what is slow or wrong and says nothing by itself: of this machine; of a "
        "model (a folder with a config.json, the file, a class of transformers, a name on the "
        "hub); or of a script, which is run up to its first Trainer.train() and trains nothing.",
        epilog="Exit code: 0 nothing is wrong, 1 something is, 2 nothing could be looked at.",
    )


def _is_script(target: Script) -> bool:
    if target.is_module or target.target.endswith(".py"):
        return True
    return os.path.isfile(target.target) and not target.target.endswith(".json")


def _model(target: str) -> int:
    from fastft.integrations.doctor.model import MODEL_ALONE, described

    try:
        subject = described(target)
    except ValueError as error:
        return _cannot(str(error))
    return report(
        f"Model {type(subject.model).__name__} ({target})",
        examined(MODEL_ALONE, subject),
        len(MODEL_ALONE),
    )


def _script(script: Script) -> int:
    """Runs the script until its first training would begin; the process ends there."""
    from fastft.integrations.trainings import at_train

    try:
        with at_train(_diagnose):
            execute(script)
    except SystemExit as error:
        return _cannot(f"{script.target} ended before a Trainer trained (exit code {error.code})")
    except Exception:
        traceback.print_exc()
        return _cannot(f"{script.target} failed before a Trainer trained")
    return _cannot(f"{script.target} called no Trainer.train()")


def _diagnose(trainer: Trainer, resume: str | bool | None) -> NoReturn:
    """Says what there is to say of a training that is about to begin, and ends the process.

    An exception would let the script go on: it could save the untrained model over another.
    """
    code = NO_ANSWER
    try:
        code = _training(trainer)
    except Exception:
        traceback.print_exc()
        _cannot("the first batches could not be made; a training would fail in the same way")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _training(trainer: Trainer) -> int:
    from fastft.foreign.models import base_model
    from fastft.integrations.doctor.batches import BATCHES, sample
    from fastft.integrations.doctor.model import MODEL, Subject
    from fastft.integrations.doctor.training import TRAINING

    seen = sample(trainer)
    on_gpu = trainer.args.device.type != "cpu"
    model = Subject(base_model(trainer.model), on_gpu, trainer.processing_class)
    subjects: list[tuple[Sequence[Any], Any]] = [
        (MACHINE, this_machine()),
        (MODEL, model),
        (TRAINING, seen),
        (BATCHES, seen),
    ]
    findings = [finding for checks, subject in subjects for finding in examined(checks, subject)]
    title = f"{type(trainer).__name__} of {type(model.model).__name__}, {seen.size} looked at"
    return report(title, findings, sum(len(checks) for checks, _ in subjects))


def report(title: str, findings: list[Finding], checks: int) -> int:
    """Prints findings, the worst first, and returns the exit code."""
    print(f"{title}\n")
    for finding in sorted(findings, key=lambda each: SEVERITIES.index(each.severity)):
        print(f"{finding.severity.upper()}: {finding.check}")
        for text in (finding.what, finding.why, f"-> {finding.remedy}"):
            print(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  "))
        print()
    counts = {kind: sum(each.severity == kind for each in findings) for kind in SEVERITIES}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    print(f"{checks} checks: {said or 'nothing is wrong or slow'}.")
    return WRONG if counts["wrong"] else 0


def _cannot(reason: str) -> int:
    print(f"fastft doctor: {reason}", file=sys.stderr)
    return NO_ANSWER
