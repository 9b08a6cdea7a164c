"""Fixtures of every benchmark."""

from __future__ import annotations

import pytest
from compare import DEVICE

# on the host in any case: minutes that a machine with a GPU has better uses for
collect_ignore = ["test_plan.py", "test_collator.py"] if DEVICE == "cuda" else []


@pytest.fixture
def device() -> str:
    return DEVICE
