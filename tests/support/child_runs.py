"""What stands in for the processes that `compare` starts: synthetic traces, or real trainings in
processes that have imported everything already."""

import contextlib
import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

from support.synthetic_traces import trace

_PRELOADED = [
    "transformers.trainer",
    "fastft.integrations.plug.plug",
    "fastft.commands.recorded_script",
]


def option(command, name):
    """The value of an option of the child, or None."""
    return command[command.index(name) + 1] if name in command else None


class SyntheticRuns:
    """In the place of `children.run`: writes a synthetic trace for each command.

    `change(made, command)` changes it, or returns another one, or an exit code without any. `seen`
    has the variants and pieces that were run.
    """

    def __init__(self, change=lambda made, command: None, **options):
        self.seen, self.commands, self._change, self._options = [], [], change, options

    def __call__(self, command, log, watch):
        self.commands.append(command)
        variant, only = option(command, "--variant"), option(command, "--only")
        self.seen.append(variant)
        watch(0.1)
        Path(log).write_text("the script's output\n")
        options = {**self._options, "steps": int(option(command, "--steps"))}
        made = trace(variant, seed=1, **options)
        made.only = only
        changed = self._change(made, command)
        if isinstance(changed, int):
            return changed
        (changed or made).save(option(command, "--out"))
        return 0


def _train(command, log):
    with open(log, "wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv[:] = command
    sys.path.insert(0, "")
    with contextlib.suppress(SystemExit):
        importlib.import_module("fastft.commands.recorded_script").main(command)
    sys.stdout.flush()
    os._exit(0)


def run_preloaded(command, log, watch):
    """In the place of `children.run`: a real training, forked from a server that has imported
    transformers and fastft and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    arguments = command[command.index("fastft.commands.recorded_script") + 1 :]
    process = context.Process(target=_train, args=(arguments, str(log)))
    process.start()
    process.join()
    watch(1.0)
    return process.exitcode


def report(folder):
    """report.json of a comparison."""
    return json.loads((Path(folder) / "report.json").read_text())
