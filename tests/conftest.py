"""Fixtures of every test file."""

from __future__ import annotations

import importlib
import logging
import os
import sys

# before numpy: its threads make a busy machine many times slower
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

import fastft

fastft._import_rooms()  # for tests that ask which operators there are

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["support.ways_table"]


# an option with the file of a page: what the tests record for it, and the room that writes it
PAGES = {
    "--architectures": ("architecture", "table"),
    "--packing-matrix": ("packing", "packing_table"),
    "--image-packing": ("image packing", "image_packing_table"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for option, (name, _) in PAGES.items():
        parser.addoption(
            option, metavar="FILE", help=f"where the page of {name!r} is written (make sweep)"
        )
    parser.addoption("--fuzz-seconds", type=float, help="how long each room of tests/fuzz is tried")
    parser.addoption(
        "--fuzz-first", action="store_true", help="end with the first failure, not the smallest"
    )
    parser.addoption("--fuzz-seed", type=int, default=0, help="of the first round of cases")


def pytest_configure(config: pytest.Config) -> None:
    for option, (name, room) in PAGES.items():
        path = config.getoption(option)
        # the process that hears of every worker's tests
        if path and not hasattr(config, "workerinput"):
            from support.architectures.gathered import Gathered

            written = importlib.import_module(f"support.architectures.{room}").written
            config.pluginmanager.register(Gathered(path, name, written))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not item.keywords: a folder may be called gpu
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where a kernel has spoilt the process's context, every later test in it would fail: xdist
    starts another one."""
    if (
        "PYTEST_XDIST_WORKER" in os.environ
        and item.get_closest_marker("gpu")
        and torch.cuda.is_initialized()
    ):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(
                f"{item.nodeid} has not run, an earlier test has left this: {error}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(70)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def as_loud_as_before():
    """What one test (or a command that it calls) makes transformers say is not the next one's."""
    logger = logging.getLogger("transformers")
    level, propagate = logger.level, logger.propagate
    yield
    if level:  # else transformers was imported in between
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def quiet(as_loud_as_before):
    """transformers says errors alone: a test that makes many models, or trains on purpose what it
    warns of."""
    import transformers

    transformers.logging.set_verbosity_error()


@pytest.fixture
def poisoned_empty():
    """torch.empty filled with NaN (or the largest integer), so that an output which nobody wrote
    shows."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
