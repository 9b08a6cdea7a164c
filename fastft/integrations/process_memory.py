"""How much memory this process holds, and has held at most, as its system says. In bytes."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Sets Linux's high-water mark to what the process holds now; False where that cannot be."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_since_reset() -> int:
    """The high-water mark since the last `reset_peak`, which must have worked."""
    return _status("VmHWM")


def resident() -> int:
    """What the process holds now, where `reset_peak` works."""
    return _status("VmRSS")


def highest() -> int:
    """The most that the process ever had; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
