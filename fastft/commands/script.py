"""Another program's script, run as `python script.py` or `python -m module` would run it.

What Python gives a program is given here: `__main__` with its `__file__`, `__spec__` and the rest,
`sys.argv`, `sys.path[0]`. What the program does to its process (exit code, signals, threads that
outlive it) is left to Python: nothing is caught and nothing is put back.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import io
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any


@dataclass
class Script:
    """A program and its arguments.

    `target`: the path of a script as the user wrote it, or the name of a module.
    `is_module`: whether it was given behind `-m`.
    `arguments`: what the program finds in `sys.argv[1:]`.
    """

    target: str
    is_module: bool = False
    arguments: list[str] = field(default_factory=list)


def split(
    arguments: list[str], flags: Collection[str] = ("-h", "--help")
) -> tuple[list[str], Script | None]:
    """Cuts a command line before the script's name: the command's own arguments, and the script.

    The script's name is the first argument that is no option nor the value of one; `-m` or `--`
    before it end the options as well.

    Args:
        arguments: as `sys.argv[1:]`.
        flags: the command's options without a value. Every other one has its value behind "=", or
            as the next argument.

    Returns:
        The arguments that are the command's, and the script; None where none is named.
    """
    own, rest = [], list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "--"):
        option = rest.pop(0)
        own.append(option)
        if rest and option not in flags and "=" not in option:
            own.append(rest.pop(0))
    if rest[:1] == ["--"]:
        del rest[0]
    is_module = rest[:1] == ["-m"]
    if is_module:
        del rest[0]
    return own, Script(rest[0], is_module, rest[1:]) if rest else None


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Lets a command be given the rank that deepspeed puts before its name: `local_rank` of the
    options is what the script gets first."""
    for name in ("--local_rank", "--local-rank"):
        parser.add_argument(
            name,
            dest="local_rank",
            action="append",
            type=f"{name}={{}}".format,
            default=[],
            help=argparse.SUPPRESS,
        )


def reason_against(script: Script | None) -> str | None:
    """Why it cannot be run, in a sentence; None where it can. Imports nothing."""
    if script is None:
        return "a script is missing: name one, or a module behind -m"
    if script.is_module:
        package = script.target.partition(".")[0]
        there = package.isidentifier() and importlib.util.find_spec(package) is not None
        return None if there else f"there is no module {script.target!r} (in {os.getcwd()})"
    if os.path.isdir(script.target):
        return f"{script.target} is a folder: name the script in it, or a package behind -m"
    there = os.path.exists(script.target)
    return None if there else f"there is no script {script.target!r} (in {os.getcwd()})"


def execute(script: Script) -> None:
    """Runs it as `__main__`. Whatever it raises, `SystemExit` too, passes through.

    This is for the rest of the process: `sys.argv`, `sys.path[0]` and `sys.modules["__main__"]` are
    the script's from here on, so that what outlives its last line (threads, `atexit`, pickling)
    finds them as it would without us.

    Raises:
        ModuleNotFoundError: there is no such module, or it is a package without `__main__`.
    """
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    # what Python's own has: functions of the script find the module of builtins there, not a dict
    names: dict[str, Any] = vars(main)
    names |= {"__builtins__": builtins, "__cached__": None}
    if sys.version_info < (3, 14):
        names |= {"__annotations__": {}}
    code = _module(script, names) if script.is_module else _file(script, names)
    sys.argv[:] = [names["__file__"] if script.is_module else script.target, *script.arguments]
    exec(code, names)


def _file(script: Script, names: dict[str, Any]) -> CodeType:
    path = os.path.abspath(script.target)  # as Python has it, links not followed
    names |= {"__file__": path, "__loader__": SourceFileLoader("__main__", path)}
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = os.path.dirname(os.path.realpath(path))  # here it does follow them
    with io.open_code(path) as file:
        return compile(file.read(), path, "exec", dont_inherit=True)


def _module(script: Script, names: dict[str, Any]) -> CodeType:
    spec = importlib.util.find_spec(script.target)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{script.target}.__main__")
    code = None if spec is None else _code_of(spec)
    if spec is None or code is None:
        raise ModuleNotFoundError(
            f"No module named {script.target}, or it is a package that cannot be run",
            name=script.target,
        )
    names |= {"__spec__": spec, "__loader__": spec.loader, "__package__": spec.parent}
    names |= {"__file__": spec.origin, "__cached__": spec.cached}
    return code


def _code_of(spec: ModuleSpec) -> CodeType | None:
    # a namespace package has no loader, an extension module no code
    get_code = getattr(spec.loader, "get_code", None)
    return None if get_code is None else get_code(spec.name)


def of_script(traceback: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins in the script; None where it was not reached."""
    main = vars(sys.modules["__main__"])
    while traceback is not None and traceback.tb_frame.f_globals is not main:
        traceback = traceback.tb_next
    return traceback
