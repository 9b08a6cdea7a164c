"""Versions of the packages that a training depends on, for reports."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys

_PACKAGES = (
    *("fastft", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl"),
    *("deepspeed", "bitsandbytes", "liger_kernel", "triton", "numpy"),
)


def loaded_versions() -> dict[str, str]:
    """Those of Python and of what this process has imported; without metadata there is none."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        if package in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[package] = importlib.metadata.version(package)
    return found
