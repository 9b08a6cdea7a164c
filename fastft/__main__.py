"""`python -m fastft [command] ...`: the engines of this machine without a command, else one of
`commands/`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

COMMANDS = {
    "run": "train with an unchanged script, with what fits of fastft",
    "compare": "train with it stock and with fastft by turns: are the losses equal, what is saved?",
    "estimate": "peak memory of a training by parts, from the model's configuration alone",
    "doctor": "what is slow or wrong in a script or a model, and says nothing",
}
_USAGE = "usage: python -m fastft [command] ...\n\nWithout a command: versions, devices, engines.\n"


def main(arguments: list[str]) -> int:
    """Hands over to a command, which parses the rest and returns the exit code."""
    if not arguments:
        return _main_of("engines")()
    if arguments[0].startswith(("--local_rank=", "--local-rank=")):
        arguments = [*arguments[1:2], arguments[0], *arguments[2:]]  # deepspeed puts it first
    command, *rest = arguments
    if command in COMMANDS:
        return _main_of(command)(rest)
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    text = f"{_USAGE}\n{listed}\n\npython -m fastft COMMAND --help says more."
    if command in ("-h", "--help"):
        print(text)
        return 0
    print(f"{text}\n\nfastft: there is no command {command!r}", file=sys.stderr)
    return 2


def _main_of(command: str) -> Callable[..., int]:
    # each is imported when it is asked for: `estimate` has no use for what `compare` imports
    main: Callable[..., int] = importlib.import_module(f"fastft.commands.{command}").main
    return main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
