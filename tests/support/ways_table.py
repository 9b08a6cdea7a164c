"""A pytest plugin: the tables of ways in `docs/works-with.md` and the README, of what tests with
the mark `way` have shown, and their record, `benchmarks/results/ways.json` (make matrix).

The record has, of every cell, its word and its tests, each with its outcome and the run that it is
from. A cell shows its word if each of its tests has run, none failed and one passed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.ways import (
    COLUMNS,
    SECTIONS,
    WORDS,
    Claim,
    claims,
    disagreements,
)

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "benchmarks" / "results" / "ways.json"
LONG, SHORT = ROOT / "docs" / "works-with.md", ROOT / "README.md"
FAILED, NOT_RUN = "**fails**", "not run"
_BEGIN = "<!-- make matrix writes from here -->\n"
_END = "<!-- to here -->\n"
_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "torchao",
    "ray",
    "optuna",
    "lightning",
)
_PROPERTY = "ways"

Tests = dict[str, list[Claim]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ways", metavar="FILE", help="where outcomes of tests of ways are kept (make matrix)"
    )
    parser.addoption(
        "--ways-tables", action="store_true", help="writes the tables of ways (make matrix)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(collected := Collected(), "collected ways")
    path = config.getoption("--ways")
    # the process that hears of every worker's tests
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))
    if config.getoption("--ways-tables"):
        config.pluginmanager.register(Writer(collected))


class Collected:
    """What every collected test claims, deselected or not, and the files that were skipped whole
    because a library is missing; a plugin of every process that collects."""

    def __init__(self) -> None:
        self.tests: Tests = {}
        self.skipped: set[str] = set()
        self.complete = False  # pytest calls what comes after a failed collection, too

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.add(report.nodeid)

    @pytest.hookimpl(tryfirst=True)  # before -m deselects
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        wrong: dict[str, None] = {}  # in order; a function's cases say the same
        for item in items:
            try:
                claimed = claims(item)
            except pytest.UsageError as error:
                wrong[str(error)] = None
                continue
            if claimed:
                self.tests[item.nodeid] = claimed
                item.user_properties.append((_PROPERTY, claimed))
        wrong |= dict.fromkeys(disagreements(self.tests))
        if wrong:
            raise pytest.UsageError("\n".join(wrong))
        self.complete = True

    def whole(self, session: pytest.Session) -> bool:
        """Whether the whole suite was collected, on which alone the tables can be judged."""
        return {Path(arg).resolve() for arg in session.config.args} == {ROOT / "tests"}


class Recorder:
    """Hears of every test, in whichever worker it ran, and merges the outcomes into the record."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.tests: Tests = {}
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, claimed in report.user_properties:
            if name == _PROPERTY:
                self.tests[report.nodeid] = [tuple(claim) for claim in claimed]
        if report.when == "call" or not report.passed:
            worst = self.outcomes.get(report.nodeid) == "failed"
            self.outcomes[report.nodeid] = "failed" if worst else report.outcome

    def pytest_sessionfinish(self) -> None:
        if not self.tests:
            return
        record = read(self.path)
        tests, found = _unfolded(record)
        run = f"{datetime.date.today()} {_commit()}"
        record["runs"][run] = _versions()
        tests |= self.tests
        # a test that took its worker down reports no marks: those of the record are its own
        found |= {test: (how, run) for test, how in self.outcomes.items() if test in tests}
        write(self.path, tests, found, record["runs"])


def read(path: Path = RECORD) -> dict[str, Any]:
    """The record; an empty one where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"runs": {}, "cells": {}}


def write(path: Path, tests: Tests, found: dict[str, tuple[str, str]], runs: dict) -> None:
    """Writes the record of these tests, in the order of the rows, with the runs that are left."""
    used = {run for test, (_, run) in found.items() if test in tests}
    record = {
        "runs": {run: versions for run, versions in sorted(runs.items()) if run in used},
        "cells": _cells(tests, found),
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def current(tests: Tests, skipped: set[str], record: dict[str, Any]) -> dict[str, Any]:
    """The record's cells as the marks are now: tests that have gone are out, new ones have not run;
    of files that were skipped whole, what was recorded stays."""
    recorded, found = _unfolded(record)
    hidden = {test: said for test, said in recorded.items() if test.partition("::")[0] in skipped}
    return _cells(hidden | tests, found)


def _cells(tests: Tests, found: dict[str, tuple[str, str]]) -> dict[str, Any]:
    cells: dict[str, Any] = {way.name: {} for ways in SECTIONS.values() for way in ways}
    for test in sorted(tests):
        for row, column, word in tests[test]:
            if row in cells:  # not in a record of a row that has gone
                cell = cells[row].setdefault(column, {"word": word, "tests": {}})
                cell["tests"][test] = list(found.get(test, (NOT_RUN, "")))
    return {
        row: {column: of[column] for column in COLUMNS if column in of}
        for row, of in cells.items()
        if of
    }


def _unfolded(record: dict[str, Any]) -> tuple[Tests, dict[str, tuple[str, str]]]:
    """What the tests of a record claim, and what came of them."""
    tests: Tests = {}
    found: dict[str, tuple[str, str]] = {}
    for row, columns in record["cells"].items():
        for column, cell in columns.items():
            for test, (outcome, run) in cell["tests"].items():
                tests.setdefault(test, []).append((row, column, cell["word"]))
                if outcome != NOT_RUN:
                    found[test] = (outcome, run)
    return tests, found


def shown(cell: dict[str, Any] | None) -> str:
    """What stands in a cell: its word, that a test of it fails or has not run, or nothing."""
    if cell is None:
        return ""
    outcomes = {outcome for outcome, _ in cell["tests"].values()}
    if "failed" in outcomes:
        return FAILED
    return NOT_RUN if NOT_RUN in outcomes or "passed" not in outcomes else cell["word"]


def long_table(cells: dict[str, Any]) -> str:
    """The whole table, a part for each section."""
    lines = ["", *(f"* **{word}**: {meaning}." for word, meaning in WORDS.items()), ""]
    for section, ways in SECTIONS.items():
        lines += [f"## {section}", "", _row("", *COLUMNS.values(), ""), _row(*["---"] * 5)]
        for way in ways:
            of = cells.get(way.name, {})
            lines.append(_row(way.name, *(shown(of.get(name)) for name in COLUMNS), way.note))
        lines.append("")
    return "\n".join(lines)


def short_table(cells: dict[str, Any]) -> str:
    """The README's: one row for the ways that share its name, with every word that one has."""
    together: dict[str, list[str]] = {}
    for ways in SECTIONS.values():
        for way in ways:
            if way.short:
                together.setdefault(way.short, []).append(way.name)
    lines = ["", _row("", *COLUMNS.values()), _row(*["---"] * 4)]
    order = [*WORDS, NOT_RUN, FAILED]
    for short, names in together.items():
        of = [[shown(cells.get(name, {}).get(column)) for name in names] for column in COLUMNS]
        words = [sorted(set(words) - {""}, key=order.index) for words in of]
        lines.append(_row(short, *(", ".join(each) for each in words)))
    return "\n".join([*lines, ""])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def page_with(page: Path, table: str) -> str:
    """A page's text with this table between its comments."""
    before, begin, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} needs the lines {_BEGIN!r} and {_END!r} around its table of ways")
    return f"{before}{_BEGIN}{table}{_END}{after}"


def pages(cells: dict[str, Any]) -> dict[Path, str]:
    """The pages with tables of ways, as they must read."""
    return {
        LONG: page_with(LONG, long_table(cells)),
        SHORT: page_with(SHORT, short_table(cells)),
    }


class Writer:
    """Writes the tables and drops what has gone from the record, once all tests are collected."""

    def __init__(self, collected: Collected) -> None:
        self.collected = collected

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not self.collected.complete:
            return
        if not self.collected.whole(session):
            raise pytest.UsageError("--ways-tables: collect the whole suite, without a file")
        record = read()
        cells = current(self.collected.tests, self.collected.skipped, record)
        tests, found = _unfolded({"cells": cells})
        write(RECORD, tests, found, record["runs"])
        for page, text in pages(cells).items():
            page.write_text(text)


def _commit() -> str:
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found
