"""A plugin of pytest, `-p pytest_ledger --ledger FILE --part NAME`: a line when a case begins,
another when it ends.

A case that has filled a dictionary `extra_info` (pytest-benchmark's, or a property of that name)
finds it in its line. With `--not-again`, cases which have a line already are left out, and the
process ends after a case that has failed: it may have spoilt the context of its GPU, or hold its
memory, and then every later one would fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger import Ledger

_SAID = 4000  # characters of a failure that a line keeps


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ledger")
    group.addoption(
        "--ledger", type=Path, help="the file that a line of JSON is appended to for each case"
    )
    group.addoption("--part", help="goes into the lines")
    group.addoption(
        "--not-again", action="store_true", help="leave out what has a line, end with a failure"
    )


def pytest_configure(config: pytest.Config) -> None:
    # xdist's workers report to this process
    if config.getoption("--ledger") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Keeper(config))


class _Keeper:
    def __init__(self, config: pytest.Config) -> None:
        self.ledger, self.part = Ledger(config.getoption("--ledger")), config.getoption("--part")
        self.not_again, self.failed = config.getoption("--not-again"), set[str]()
        self.done = set(self.ledger.cases(self.part)) if self.not_again else set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.done:
            self._end(report.nodeid, "failed", said=report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.ledger.append(part=self.part, case=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (report.when != "call" and report.passed) or report.nodeid in self.failed:
            return  # what goes wrong after a failure hides no reason
        found = dict(report.user_properties)
        found |= {"said": report.longreprtext} if report.failed else {}
        found |= (
            {"said": str(report.longrepr[2])}
            if report.skipped and isinstance(report.longrepr, tuple)
            else {}
        )
        self._end(report.nodeid, report.outcome, seconds=round(report.duration, 2), **found)
        self.failed |= {report.nodeid} if report.failed else set()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.failed and self.not_again:
            raise pytest.exit.Exception(
                f"{nodeid} failed: a new process goes on", returncode=pytest.ExitCode.INTERRUPTED
            )

    def _end(self, case: str, outcome: str, **found: object) -> None:
        said = found.pop("said", None)
        kept = {"said": str(said)[-_SAID:]} if said else {}
        self.ledger.append(part=self.part, case=case, outcome=outcome, **found, **kept)
