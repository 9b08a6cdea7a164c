"""Fixtures of every benchmark."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from compare import DEVICE


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What a benchmark has found until it failed is found all the same: its report has it
    (pytest_ledger.py)."""
    try:
        return (yield)
    finally:
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if benchmark is not None:
            item.user_properties.append(("found", dict(benchmark.extra_info)))


@pytest.fixture(autouse=True)
def memory_for_the_next() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
