"""A script under `python -m fastft run` finds, and leaves, what it finds and leaves under
`python`: each is started both ways, and what both say is compared."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from fastft.commands.script import Script, reason_against, split

FINDS = """
import atexit, inspect, multiprocessing, os, pickle, signal, sys, threading, time, warnings


class Thing:
    pass


def square(number):
    return number * number, __name__, Thing.__module__


def named(value):
    return value if isinstance(value, str | dict | list | None) else type(value).__name__


def outlives():
    time.sleep(0.1)
    print("a thread", pickle.loads(pickle.dumps(Thing)) is Thing, __name__)


if __name__ == "__main__":
    own = {name: named(value) for name, value in globals().items() if name.startswith("__")}
    print(sorted(own.items()))
    print(sys.argv, sys.path, os.getcwd(), sys.flags)
    print(sys.modules["__main__"].__dict__ is globals(), named(__builtins__))
    print({"torch", "numpy", "transformers", "accelerate"} & set(sys.modules))
    print(pickle.dumps(Thing), inspect.getsource(Thing))
    print([(number, signal.getsignal(number)) for number in signal.valid_signals()])
    print([(stream.encoding, stream.line_buffering, stream.isatty()) for stream in (
        sys.stdin, sys.stdout, sys.stderr)], sys.stdin.read(), sys.excepthook is sys.__excepthook__)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [3]))
    warnings.warn("of the script", DeprecationWarning)
    atexit.register(lambda: print("at the end", sys.argv, pickle.dumps(Thing)))
    threading.Thread(target=outlives).start()
"""
ENDS = {
    "exit code": "import sys; sys.exit(3)",
    "words": "import sys; sys.exit('in words')",
    "nothing": "raise SystemExit",
    "an error": "def f(): raise KeyError('x')\nf()",
    "a cause": "try:\n    1 / 0\nexcept Exception as one:\n    raise OSError from one",
    "several errors": "raise KeyError('x') if __import__('sys').version_info < (3, 11) else "
    "ExceptionGroup('two', [KeyError(1), OSError(2)])",
    "no Python": "if:",
    "a module that is missing": "import no_such_module",
    "Ctrl-C": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)",
    "terminated": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "at once": "import os; print('unflushed'); os._exit(7)",
    "its own excepthook": "import sys\n"
    "sys.excepthook = lambda kind, error, at: print(kind, error, at.tb_lineno, at.tb_next)\n"
    "raise OSError('seen')",
}
RUN = ["-m", "fastft", "run"]


def started(folder, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        input="of stdin",
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = re.sub(r"^fastft: .*\n", "", done.stderr, flags=re.MULTILINE)
    return done.returncode, done.stdout, re.sub(r'  File "<frozen runpy>".*\n', "", said)


@pytest.fixture
def folder(tmp_path):
    for place in ("", "package", "elsewhere"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "finds.py").write_text(FINDS)
    (tmp_path / "package" / "__init__.py").write_text("")
    # multiprocessing's children do not find the functions of such a file, under Python as well
    (tmp_path / "package" / "__main__.py").write_text(FINDS.replace("pool.map(square, [3])", ""))
    (tmp_path / "link.py").symlink_to("elsewhere/finds.py")
    return tmp_path


@pytest.mark.parametrize(
    "script",
    [
        ["finds.py"],
        ["elsewhere/finds.py", "--only", "-m", "--", "x y"],
        ["link.py", "-"],
        ["-m", "finds", "1"],
        ["-m", "package"],
        ["-m", "package.finds", "--help"],
    ],
    ids=" ".join,
)
def test_it_finds_what_python_gives_it(folder, script):
    expected = started(folder, *script)
    assert expected[0] == 0, expected[2]
    assert started(folder, *RUN, *script) == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no safe path")
def test_a_safe_path_stays_safe(folder):
    expected = started(folder, "elsewhere/finds.py", PYTHONSAFEPATH="1")
    assert started(folder, *RUN, "elsewhere/finds.py", PYTHONSAFEPATH="1") == expected


@pytest.mark.parametrize("source", ENDS.values(), ids=ENDS)
def test_it_ends_as_under_python(tmp_path, source):
    (tmp_path / "ends.py").write_text(source)
    assert started(tmp_path, *RUN, "ends.py") == started(tmp_path, "ends.py")


def test_ctrl_c_is_a_signal_to_who_waits_for_it(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS["Ctrl-C"])
    assert started(tmp_path, *RUN, "ends.py")[0] == -signal.SIGINT


@pytest.mark.parametrize(
    ("line", "own", "script"),
    [
        ("a.py", [], Script("a.py")),
        ("--only loss a.py --only b", ["--only", "loss"], Script("a.py", False, ["--only", "b"])),
        ("--packing=3 -m a.b -m", ["--packing=3"], Script("a.b", True, ["-m"])),
        ("-h a.py", ["-h"], Script("a.py")),
        ("--only loss -- a.py -- b", ["--only", "loss"], Script("a.py", False, ["--", "b"])),
        ("--only", ["--only"], None),
        ("-m", [], None),
        ("", [], None),
    ],
)
def test_the_command_line_is_cut_before_the_script(line, own, script):
    assert split(line.split()) == (own, script)


def test_flags_of_a_command_have_no_value():
    assert split(["--noise", "a.py"], flags=("--noise",)) == (["--noise"], Script("a.py"))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "a script is missing"),
        (Script("nowhere.py"), "there is no script 'nowhere.py'"),
        (Script("."), "is a folder"),
        (Script("no_such_package.module", True), "there is no module 'no_such_package.module'"),
        (Script("a-b", True), "there is no module 'a-b'"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(script, words):
    assert words in reason_against(script)


def test_what_can_be_run_has_no_reason_against_it(tmp_path):
    (tmp_path / "a.py").write_text("")
    assert reason_against(Script(str(tmp_path / "a.py"))) is None
    assert reason_against(Script("json.tool", True)) is None
