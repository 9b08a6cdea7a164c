"""What the machine needs compiled, kept under build/ptx by the hash of its sources and commands."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_DAY = 86_400.0
_CACHE = ROOT / "build" / "ptx"


def compiled(name: str, sources: Sequence[Path], commands: Sequence[Sequence[str]]) -> Path:
    """The folder where `commands`, run in it, have made of `sources` what they make; at most one
    process runs them.

    Raises:
        RuntimeError: a command failed; holds what it said.
    """
    content = [path.read_bytes() for path in sources]
    digest = hashlib.sha256(
        repr((content, list(map(str, sources)), commands)).encode()
    ).hexdigest()[:20]
    folder = _CACHE / f"{name}-{digest}"
    if folder.exists():
        return folder
    _CACHE.mkdir(parents=True, exist_ok=True)
    with open(_CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # another process has made it meanwhile
            return folder
        for old in _CACHE.glob(f"{name}-*"):
            # another process may still read a younger one
            if old.stat().st_mtime < time.time() - _DAY:
                shutil.rmtree(old, ignore_errors=True)
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of a compilation that failed
        part.mkdir()
        for command in commands:
            done = subprocess.run(command, cwd=part, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}{done.stdout}")
        part.rename(folder)
    return folder
