"""Faults at the system calls by which a process changes a folder.

`run(work, folder, fault)` forks, lets the child do `work` under ptrace, and lists the changes which
it made below `folder`: whoever wrote (Python, Rust, C++), each call counts, and whatever a later
version writes counts by itself. A fault comes at the n-th of them. Linux on x86-64.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

needs_ptrace = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Linux on x86-64"
)

# number -> (name, where its path is): a descriptor in argument 0, a path in argument 0, or a
# descriptor of a folder in argument 0 and a path in argument 1
_CALLS = {
    1: ("write", "fd"),
    18: ("pwrite", "fd"),
    20: ("writev", "fd"),
    296: ("pwritev", "fd"),
    40: ("sendfile", "fd"),
    285: ("fallocate", "fd"),
    77: ("ftruncate", "fd"),
    74: ("fsync", "fd"),
    75: ("fdatasync", "fd"),
    2: ("open", "path"),
    85: ("creat", "path"),
    82: ("rename", "path"),
    83: ("mkdir", "path"),
    84: ("rmdir", "path"),
    87: ("unlink", "path"),
    257: ("openat", "at"),
    258: ("mkdirat", "at"),
    263: ("unlinkat", "at"),
    264: ("renameat", "at"),
    316: ("renameat2", "at"),
}
_FLAGS = {"open": 1, "openat": 2}  # the argument that says whether a file is made or emptied
_WRITES = {"write", "pwrite", "writev", "pwritev"}
_SYNCS = {"fsync", "fdatasync"}
# what takes room on a disk; a sync finds out that there is none
_GROWS = {*_WRITES, *_SYNCS, "sendfile", "fallocate", "open", "creat", "openat", "mkdir", "mkdirat"}

_TRACEME, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS = 0, 12, 13, 24, 0x4200
_OPTIONS = 1 | 0x100000  # a stop at a system call is marked, and the child ends with its parent
_STOPPED = signal.SIGTRAP | 0x80
# places in user_regs_struct
_RAX, _NUMBER, _ARGUMENTS = 10, 15, (14, 13, 12, 7)


class Change(NamedTuple):
    """A call that changes the folder, and the file below it."""

    call: str
    file: str


class Fault(NamedTuple):
    """What comes at change number `at`, and which it is.

    "before", "half" (a write has written half), "after": the process is killed. "Ctrl-C": it gets
    the signal. "full", "read-only": from there on calls fail that take room, or all of them; a
    first write ends in its middle.
    """

    at: int
    kind: str


class Ended(NamedTuple):
    """How the child ended: its exit status, what it raised, what it had changed or begun to."""

    status: int
    error: str
    changes: list[Change]

    @property
    def killed(self) -> bool:
        """Whether the fault has killed it."""
        return self.status == -signal.SIGKILL


def run(work: Callable[[], Any], folder: Path, fault: Fault | None = None) -> Ended:
    """Does `work` in a forked process; what it changed below `folder`, and how it ended.

    The calls of its main thread are seen. Syncs are counted and not done.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        _child(work, writes)
    os.close(writes)
    try:
        ended, changes = _Traced(child, str(folder.resolve()), fault).follow()
        with os.fdopen(reads, closefd=False) as pipe:
            return Ended(ended, pipe.read(), changes)
    finally:
        os.close(reads)


def faults_of(work: Callable[[], Any], folder: Path, *kinds: str) -> Iterator[Fault]:
    """Each fault of the kinds that can meet `work`, which is done once to count its changes."""
    ended = run(work, folder)
    assert ended.status == 0, ended.error
    for number, change in enumerate(ended.changes):
        for kind in kinds:
            if kind != "half" or change.call in _WRITES:
                yield Fault(number, kind)


def _child(work: Callable[[], Any], pipe: int) -> None:
    status = 1
    try:
        # who runs tests in the background has it ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        status = 0
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode()[:4000])
    finally:
        os._exit(status)


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    library.ptrace.restype = ctypes.c_long
    return library


def _ptrace(request: int, child: int, data: Any = 0) -> None:
    if _libc().ptrace(request, child, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace({request}): {os.strerror(number)}")


class _Traced:
    """A child that stops at each of its system calls, twice."""

    def __init__(self, child: int, folder: str, fault: Fault | None) -> None:
        self.child, self.folder, self.fault = child, folder, fault
        self.changes: list[Change] = []
        self.registers = (ctypes.c_ulonglong * 27)()
        self.at_exit: Callable[[], None] | None = None

    def follow(self) -> tuple[int, list[Change]]:
        inside, signalled = False, 0
        os.waitpid(self.child, 0)
        _ptrace(_SETOPTIONS, self.child, _OPTIONS)
        while True:
            try:
                _ptrace(_SYSCALL, self.child, signalled)
            except ProcessLookupError:
                pass  # it has been killed, and waits to be waited for
            _, status = os.waitpid(self.child, 0)
            if not os.WIFSTOPPED(status):
                return os.waitstatus_to_exitcode(status), self.changes
            stop = os.WSTOPSIG(status)
            signalled = 0 if stop == _STOPPED else stop
            if stop == _STOPPED:
                inside = not inside
                self._enter() if inside else self._leave()

    def _enter(self) -> None:
        _ptrace(_GETREGS, self.child, self.registers)
        found = _CALLS.get(self.registers[_NUMBER])
        change = found and self._change(*found)
        if not change:
            return
        self.changes.append(change)
        number, call = len(self.changes) - 1, change.call
        fault = self.fault
        if call in _SYNCS:
            self._instead(0)
        if fault is None or number < fault.at:
            return
        if fault.kind in ("full", "read-only"):
            if fault.kind == "full" and call not in _GROWS:
                return
            if number == fault.at and call in _WRITES:
                self._halve()
            else:
                self._instead(-(errno.ENOSPC if fault.kind == "full" else errno.EROFS))
        elif number > fault.at:
            return
        elif fault.kind == "Ctrl-C":
            os.kill(self.child, signal.SIGINT)
        elif fault.kind == "before":
            self._kill()
        else:
            if fault.kind == "half":
                self._halve()
            self.at_exit = self._kill

    def _leave(self) -> None:
        at_exit, self.at_exit = self.at_exit, None
        if at_exit is not None:
            at_exit()

    def _kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)

    def _halve(self) -> None:
        self.registers[_ARGUMENTS[2]] = (self.registers[_ARGUMENTS[2]] + 1) // 2
        _ptrace(_SETREGS, self.child, self.registers)

    def _instead(self, result: int) -> None:
        """The call is not made, and returns `result`."""
        self.registers[_NUMBER] = 2**64 - 1
        _ptrace(_SETREGS, self.child, self.registers)

        def at_exit() -> None:
            _ptrace(_GETREGS, self.child, self.registers)
            self.registers[_RAX] = result % 2**64
            _ptrace(_SETREGS, self.child, self.registers)

        self.at_exit = at_exit

    def _change(self, call: str, place: str) -> Change | None:
        """The change that a call is about to make below the folder, if it is one."""
        arguments = [self.registers[index] for index in _ARGUMENTS]
        if call in _FLAGS and not arguments[_FLAGS[call]] & (os.O_CREAT | os.O_TRUNC):
            return None
        process = f"/proc/{self.child}"
        if place == "fd":
            path = _link(f"{process}/fd/{arguments[0]}")
        else:
            named = arguments[1] if place == "at" else arguments[0]
            own = place == "at" and arguments[0] < 2**31
            base = _link(f"{process}/fd/{arguments[0]}" if own else f"{process}/cwd")
            path = os.path.normpath(os.path.join(base, self._text(named)))
        if path != self.folder and not path.startswith(self.folder + os.sep):
            return None
        return Change(call, os.path.relpath(path, self.folder))

    def _text(self, address: int) -> str:
        with open(f"/proc/{self.child}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            found = memory.read(min(4096, 4096 - address % 4096))
            if b"\0" not in found:
                found += memory.read(4096)
        return os.fsdecode(found.split(b"\0", 1)[0])


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
