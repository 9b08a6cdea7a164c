"""Lengths of real texts that every machine has: the functions and classes of Python's standard
library, in words and signs."""

from __future__ import annotations

import functools
import platform
import re
import sysconfig
from pathlib import Path

import numpy as np

NAME = f"the library of Python {'.'.join(platform.python_version_tuple()[:2])}"


@functools.cache
def lengths() -> np.ndarray:
    """A document is what begins at the left margin with "def" or "class"; int32."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for document in re.split(r"^(?=def |class )", text, flags=re.MULTILINE)[1:]:
            found.append(len(re.findall(r"\w+|[^\w\s]", document)))
    return np.array(found, dtype=np.int32)
