"""Fixtures of every benchmark."""

from __future__ import annotations

import pytest
from compare import DEVICE


@pytest.fixture
def device() -> str:
    return DEVICE
