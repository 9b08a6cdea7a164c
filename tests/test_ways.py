"""The tables of ways say what marks and recorded outcomes say; a wrong mark is an error."""

from __future__ import annotations

import json
import os
import re
from types import SimpleNamespace

import pytest
from support import ways, ways_table

pytest_plugins = ["pytester"]


@pytest.fixture
def collected(request):
    """All tests of the suite, where this run has collected them."""
    found = request.config.pluginmanager.get_plugin("collected ways")
    if not found.whole(request.session):
        pytest.skip("only a run of the whole suite knows every mark")
    return found


def test_tables_and_record_are_those_of_the_marks(collected):
    record = ways_table.read()
    cells = ways_table.current(collected.tests, collected.skipped, record)
    assert record["cells"] == cells, "make matrix records what tests with new marks show"
    for page, text in ways_table.pages(cells).items():
        assert page.read_text() == text, "pytest --collect-only --ways-tables writes it"


def test_no_cell_fails_or_has_not_run():
    cells = ways_table.read()["cells"]
    bad = (ways_table.FAILED, ways_table.NOT_RUN)
    shown = {
        (row, column): ways_table.shown(cell)
        for row, columns in cells.items()
        for column, cell in columns.items()
    }
    assert {place: word for place, word in shown.items() if word in bad} == {}


@pytest.mark.parametrize("way", ways.ROWS.values(), ids=ways.ROWS)
def test_what_worked_when_it_was_tried_by_hand_works(way):
    cells = ways_table.read()["cells"].get(way.name, {})
    words = {column: ways_table.shown(cells.get(column)) for column in way.worked.split()}
    assert set(words.values()) <= {"exact", "works", "no vocabulary"}, words


MARKS = {
    '"DPP", loss="exact"': "way('DPP',) is no row of tests/support/ways.py; there is ",
    'loss="exact"': "way() is no row",
    '"DDP"': "columns [] of way('DDP',); there is 'loss', 'optimizer', 'packing'",
    '"DDP", loss="exact", speed="exact"': "columns ['loss', 'speed'] of way('DDP',)",
    '"DDP", loss="tested"': "loss='tested' of way('DDP',); there is 'exact', 'works', 'stock'",
    '"DDP", packing="no vocabulary"': "packing='no vocabulary' of way('DDP',)",
}
TEST = "import pytest\n\n\n@pytest.mark.way({})\ndef test_{}():\n    {}\n"


@pytest.mark.parametrize("mark", MARKS)
def test_a_wrong_mark_is_refused_with_the_choices(mark):
    made = eval(f"pytest.mark.way({mark})").mark
    item = SimpleNamespace(nodeid="test_some.py::test_a", iter_markers=lambda name: [made])
    with pytest.raises(pytest.UsageError, match=re.escape(f"test_a: {MARKS[mark]}")):
        ways.claims(item)


@pytest.fixture
def suite(pytester, monkeypatch):
    """Runs pytest with the plugin on a file of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ways_table.ROOT / "tests"), prepend=os.pathsep)
    pytester.makeini("[pytest]\nmarkers = way")

    def run(*tests, options=()):
        pytester.makepyfile(test_some="\n".join(TEST.format(*test) for test in tests))
        return pytester.runpytest_subprocess("-p", "support.ways_table", *options)

    return run


def test_two_words_of_one_cell_end_the_collection(suite):
    said = suite(('"DDP", loss="exact"', "a", "pass"), ('"DDP", loss="works"', "b", "pass"))
    said.stderr.fnmatch_lines(["*'works' by test_some.py::test_b, and 'exact' by test_some.py::*"])


@pytest.mark.parametrize("workers", [0, 2])
def test_outcomes_are_merged_from_run_to_run(workers, suite, pytester):
    mark, options = '"DDP", loss="exact"', ["--ways", "ways.json", "-n", str(workers)]
    first = [(mark, "a", "pass"), (mark, "b", "pass"), (mark, "c", "pytest.skip('no GPU')")]
    suite(*first, options=options)
    path = pytester.path / "ways.json"
    assert ways_table.shown(ways_table.read(path)["cells"]["DDP"]["loss"]) == "exact"
    suite((mark, "b", "assert False"), options=options)
    record = ways_table.read(path)
    cell = record["cells"]["DDP"]["loss"]
    outcomes = {test[-1]: how for test, (how, run) in cell["tests"].items() if record["runs"][run]}
    assert outcomes == {"a": "passed", "b": "failed", "c": "skipped"}
    assert ways_table.shown(cell) == ways_table.FAILED
    # b has gone, and d is new
    claim = [("DDP", "loss", "exact")]
    now = {"test_some.py::test_a": claim, "test_some.py::test_d": claim}
    assert ways_table.shown(ways_table.current(now, set(), record)["DDP"]["loss"]) == "not run"
    # a file that cannot be collected without a library keeps what was recorded
    kept = ways_table.current({}, {"test_some.py"}, record)
    assert json.dumps(kept) == json.dumps(record["cells"])


def test_a_cell_of_which_nothing_ran_shows_no_word():
    cell = {"word": "exact", "tests": {"a": ["skipped", "x"]}}
    assert ways_table.shown(cell) == ways_table.NOT_RUN
