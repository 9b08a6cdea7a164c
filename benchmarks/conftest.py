"""Fixtures of every benchmark."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import goals
import pytest
import torch
from compare import DEVICE


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def small(benchmark) -> bool:
    """Where benchmarks are disabled a case is checked on little work, and nothing is timed."""
    return benchmark.disabled


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--goals", action="store_true", help="the rows of goals.py alone")
    parser.addoption("--rows", default="", help="part of the names of rows, e.g. [50M")
    parser.addoption("--row", action="append", help="a row's whole name; others may follow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, named = config.getoption("--rows"), config.getoption("--row")
    goals_alone = config.getoption("--goals")

    def chosen(item: pytest.Item) -> bool:
        row = item.name.removeprefix("test_")
        among = named is None or row in named
        return among and part in row and (row in goals.ROWS or not goals_alone)

    items[:] = [item for item in items if chosen(item)]


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
