"""The pages that `make sweep` writes: a pytest plugin that gathers what tests have found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Gathered:
    """Hears of every test, in whichever worker it ran, and writes a page at the end.

    Args:
        path: of the page.
        name: of the property that the tests record, a dict with the name of its "case".
        written: makes the page of what was recorded, by case.
    """

    def __init__(self, path: str, name: str, written: Callable[[dict[str, Any]], str]) -> None:
        self.path, self.name, self.written = Path(path), name, written
        self.found: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == self.name:
                self.found[value["case"]] = value

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(self.written(self.found))
