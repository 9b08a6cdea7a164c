"""What `make sanitize` takes for a report, and that it notices a library which no sanitizer
watches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sanitized
from support import sanitizers

from fastft import _native

RACE = "WARNING: ThreadSanitizer: data race (pid=9)\n  Write of size 4\n==================\n"
FILES = {
    "address.7": "==7==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x60\n    #0 0x7f\n"
    "SUMMARY: AddressSanitizer: heap-buffer-overflow\n",
    "address.8": "\n==8==ERROR: LeakSanitizer: detected memory leaks\nDirect leak of 8 byte(s)\n",
    "thread.9": RACE + RACE,
    "undefined.7": "plan.cpp:192:5: runtime error: signed integer overflow: 1 + 2\n    #0 0x7f\n",
}


def test_each_report_is_a_line_whoever_makes_it(tmp_path: Path) -> None:
    watched = sanitizers.Watched(tmp_path)
    assert watched.reports() == []
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    kinds = ["heap-buffer-overflow", "detected memory leaks", "data race", "data race", "overflow"]
    found = watched.reports()
    assert len(found) == 5 and all(map(str.__contains__, found, kinds))
    row = sanitized.Row("a run", watched, 0)
    assert row.wrong == [f"a run: {report}" for report in found]


def test_what_fails_without_a_report_fails(tmp_path: Path) -> None:
    watched = sanitizers.Watched(tmp_path)
    status = watched.program([sys.executable, "-c", "raise SystemExit(3)"])
    assert sanitized.Row("a run", watched, status).wrong == ["a run: it ended with status 3"]


def test_tests_and_cases_are_counted(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    results.write_text(
        '<testsuites><testsuite tests="3" skipped="1"><testcase classname="fuzz.test_fuzz">'
        '<properties><property name="fuzzed" value="losses: 1,234 cases in 5 s"/></properties>'
        '</testcase><testcase classname="data.test_plan"/><testcase classname="data.test_plan"/>'
        "</testsuite></testsuites>"
    )
    row = sanitized.Row("a run", sanitizers.Watched(tmp_path / "reports"), 0, results)
    assert (row.files, row.tests, row.skipped, row.cases, row.wrong) == (2, 3, 1, 1234, [])


@pytest.mark.skipif(bool(sanitizers.missing()), reason=str(sanitizers.missing()))
@pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")
def test_a_library_that_no_sanitizer_watches_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package of the checkout, with the sanitizer's runtime beside it."""
    monkeypatch.setattr(sanitizers, "FOLDER", tmp_path)
    plant = sanitized.plant("alignment", sanitizers.ROOT)
    with pytest.raises(SystemExit, match="here: a planted fault was not reported"):
        sanitized.see("here", plant, "misaligned address")
