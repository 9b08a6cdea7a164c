"""The harness of the benchmarks, by a clock that nobody waits for; pages have the figures that were
recorded, and no others."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import documentation
from support.documentation import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # behind the tests: some names are in both

import compare
import goals
import machine
import report
import tables
import turns


class Clock:
    """Time that passes where somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, seconds: Callable[[int], float], begins: float = 0.0) -> Callable[[], float]:
        """Works for `seconds` of its calls' number, `begins` seconds after it was called."""
        calls = 0

        def work() -> float:
            nonlocal calls
            took = seconds(calls)
            calls, self.now = calls + 1, self.now + begins + took
            return took

        return work


SECONDS = 0.6


def measured(**runs: Callable[[int], float]) -> turns.Times:
    clock = Clock()
    works = {name: clock.run(run) for name, run in runs.items()}
    return turns.by_turns(works, SECONDS, clock)


@pytest.mark.parametrize("cold", [0, 1, 2, 3])
def test_a_row_is_the_same_whatever_has_run_before_it(cold: int) -> None:
    """`cold`: calls until its caches, pools and pages are warm; another case may have warmed
    them."""
    times = measured(
        ours=lambda call: 0.03 * max(1, 2 ** (cold - call)),
        rival=lambda call: 0.05 * max(1, 3 - call),
    )
    assert times.median("ours") == pytest.approx(0.03) and times.attempts == 1
    assert times.median("rival") == pytest.approx(0.05) and times.spread() < 1e-9


def test_a_slow_moment_of_the_machine_hits_all_alike() -> None:
    """A third of the turns take twice the time: of both."""
    times = measured(
        ours=lambda call: 0.03 * (1 + (call % 9 < 3)),
        rival=lambda call: 0.06 * (1 + (call % 9 < 3)),
    )
    assert times.ratio("rival", "ours") == pytest.approx((2, 2, 2))
    assert times.attempts == 1 and times.spread() < 1e-9


def test_a_ratio_is_the_median_of_the_turns_and_not_of_the_times() -> None:
    """The rival takes twice ours in most turns, whatever both take; of the medians it is 3 / 2."""
    samples = {"ours": [1.0, 1.0, 2.0, 3.0, 4.0], "rival": [2.0, 2.0, 4.0, 3.0, 8.0]}
    times = turns.Times(samples, 1)
    assert times.ratio("rival", "ours") == (2.0, 2.0, 2.0) and times.spread() == 0.0
    assert times.median("rival") / times.median("ours") == 1.5


def test_a_row_that_scatters_is_measured_again_and_the_steadiest_is_kept() -> None:
    noisy, noise = 8, random.Random(0)
    times = measured(ours=lambda call: 0.05 * (1 if call > noisy else noise.uniform(1, 2)))
    assert times.attempts == 2 and times.spread() < 1e-9
    assert times.median("ours") == pytest.approx(0.05)


@pytest.mark.parametrize("seconds", [0.05, 3.0])
def test_what_a_rival_leaves_behind_is_no_part_of_a_row_that_scatters_by_it(seconds: float) -> None:
    """Ours takes up to twice as long behind the rival: with slow runs too, of which the first
    attempt has used all the time."""
    clock, noise, before = Clock(), random.Random(0), ["nobody"]

    def work(name: str, scatters: float) -> Callable[[int], float]:
        def works(call: int) -> float:
            behind, before[0] = before[0] != name, name
            return seconds * (1 + behind * noise.uniform(0, scatters))

        return works

    runs = {"ours": clock.run(work("ours", 1.0)), "rival": clock.run(work("rival", 0.0))}
    times = turns.by_turns(runs, SECONDS, clock)
    assert times.attempts == 2 and times.spread() < 1e-9
    assert times.median("ours") == pytest.approx(seconds)


def test_a_row_that_never_settles_ends_and_counts_as_failed() -> None:
    noise = random.Random(0)
    times = measured(ours=lambda call: noise.uniform(0.02, 0.2))
    assert 1 < times.attempts <= turns.ATTEMPTS and times.spread() > turns.FAILED
    row = {"name": "a row", "spread": times.spread(), "attempts": times.attempts}
    assert tables.unsteady([row])[0].startswith("a row: quartiles")
    assert not tables.unsteady([{"name": "another", "spread": turns.FAILED, "attempts": 1}])


def test_of_short_calls_a_sample_is_the_median_of_many() -> None:
    """One call in ten is interrupted for ten times as long."""
    times = measured(ours=lambda call: 1e-4 * (10 if call % 10 == 9 else 1))
    assert times.median("ours") == pytest.approx(1e-4) and times.spread() < 1e-9


def test_a_slow_run_has_the_fewest_samples() -> None:
    assert len(measured(ours=lambda call: 4.0).samples["ours"]) == turns.FEWEST
    assert len(measured(ours=lambda call: 0.1).samples["ours"]) == int(SECONDS / 0.1)


def test_what_takes_long_to_begin_is_not_repeated_for_its_short_work() -> None:
    """A process that imports torch for 5 seconds and then works for 8 milliseconds."""
    clock, calls = Clock(), []

    def works(call: int) -> float:
        calls.append(call)
        return 0.008

    runs = {"ours": clock.run(works, begins=5), "rival": clock.run(lambda call: 0.1, begins=5)}
    assert turns.by_turns(runs, clock=clock).median("ours") == pytest.approx(0.008)
    assert len(calls) <= 1 + turns.FEWEST


class Benchmark:
    """What pytest-benchmark gives to a case."""

    name = "a case"

    def __init__(self, disabled: bool) -> None:
        self.disabled, self.extra_info = disabled, dict[str, Any]()

    def pedantic(self, run: Callable[[], Any]) -> Any:
        return run()


@pytest.mark.parametrize("disabled", [False, True])
def test_a_case_whose_check_fails_is_not_timed(disabled: bool) -> None:
    def wrong() -> None:
        raise AssertionError("off by 3")

    ran: list[str] = []
    benchmark = Benchmark(disabled)
    with pytest.raises(AssertionError, match="off by 3"):
        compare.compare(benchmark, lambda: ran.append("ours"), {}, check=wrong)
    assert ran == [] and benchmark.extra_info == {}


def test_where_benchmarks_are_disabled_all_run_and_nothing_is_kept() -> None:
    ran: list[str] = []
    runs = {name: lambda name=name: ran.append(name) for name in ("ours", "rival", "bare")}
    benchmark = Benchmark(disabled=True)
    compare.compare(
        benchmark,
        runs["ours"],
        {"rival": runs["rival"]},
        check=lambda: ran.append("check"),
        bare=runs["bare"],
    )
    assert ran[0] == "check" and set(ran) == {"check", *runs} and benchmark.extra_info == {}


def test_what_a_row_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    took = {"ours": 0.1, "rival": 0.25, "bare work": 0.08}
    runs = {name: clock.run(lambda call, s=s: s) for name, s in took.items()}
    monkeypatch.setattr(compare, "timed", lambda run, host=0.0: compare.Took(run(), 0.0))
    monkeypatch.setattr(compare, "bytes_a_second", lambda: 2e10)
    by_turns = turns.by_turns
    monkeypatch.setattr(turns, "by_turns", lambda runs: by_turns(runs, clock=clock))
    benchmark = Benchmark(disabled=False)
    compare.compare(
        benchmark,
        runs["ours"],
        {"rival": runs["rival"]},
        check=lambda: None,
        bytes_moved=10**9,
        bare=runs["bare work"],
    )
    row = benchmark.extra_info
    assert row["median_ms"] == {"ours": 100.0, "rival": 250.0, "bare work": 80.0}
    assert row["quartiles_ms"]["rival"] == [250.0, 250.0] and row["spread"] == 0.0
    assert row["times_faster_than"] == {"rival": 2.5} and row["times_the_bare_work"] == 1.25
    assert row["ratio_quartiles"] == {"rival": [2.5, 2.5], "bare work": [0.8, 0.8]}
    assert row["bound_ms"] == 50.0 and row["gigabytes_per_second"] == 10.0
    table = tables.table([{"name": "a row", **row}])
    assert "| a row | 100.000 | 0.0% | rival 2.50 | 1.25 | 0.50 | 10.0 |" in table


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"gpu": "NVIDIA H200"}, "nvidia-h200"),
        (("AMD EPYC, 2 cores", "avx2", "avx2"), "amd-epyc-avx2"),
        (("AMD EPYC, 2 cores", "avx512bf16", "avx2"), "amd-epyc-avx512bf16-as-avx2"),
    ],
)
def test_the_folder_of_a_machine(facts: Any, name: str) -> None:
    if isinstance(facts, tuple):
        facts = dict(zip(("cpu", "processor_isa", "cpu_isa"), facts, strict=True))
    assert machine.name(facts) == name


def test_a_goal_is_judged_by_what_was_measured() -> None:
    exact = {"times_faster_than": {goals.FUSED: 0.9}, "median_ms": {"ours": 100}, "bound_ms": 95}
    rows = {"adamw[50M_fp32]": {"times_faster_than": {goals.FUSED: 0.99}}, goals.EXACT_BF16: exact}
    judged = {each.row: each.reached for each in goals.judge(rows)}
    assert judged == {"adamw[50M_fp32]": False, goals.EXACT_BF16: True}


@pytest.mark.parametrize(
    ("of_the_row", "verdict"),
    [
        ({}, "**no**"),
        ({"times_the_bare_work": 1.3}, "**no**"),  # allows 2.6
        ({"times_the_bare_work": 1.1}, "bounded: the bare work alone allows 2.20"),
        # ours, which has been seen
        ({"times_the_bare_work": 0.97}, "bounded: the bare work alone allows 2.00"),
        ({"times_the_bare_work": 0.9}, "**no**"),  # whoever beats it so is not bounded by it
        ({"bound_ms": 90.0}, "bounded: the bound alone allows 2.22"),
        ({"bound_ms": 92.0, "times_the_bare_work": 1.1}, "bounded: the bound alone allows 2.17"),
        ({"bound_ms": 70.0}, "**no**"),
    ],
)
def test_a_goal_beyond_the_bare_work_or_the_bound_is_bounded(of_the_row, verdict: str) -> None:
    row: dict[str, Any] = {"times_faster_than": {goals.FUSED: 2.0}, "median_ms": {"ours": 100.0}}
    row |= of_the_row
    (judged,) = goals.judge({"adamw[400_bf16]": row})
    assert judged.goal == "at least 2.5" and judged.verdict == verdict and not judged.reached


def trained(**more: Any) -> dict[str, Any]:
    """What whole_runs.py writes, of a training that is 2.4 times stock's speed."""
    stock = {"name": "stock Trainer", "peak_bytes": 100}
    ours = {"name": "fastft", "peak_bytes": 49, "times_faster": 2.4, "quartiles": [2.3, 2.5]}
    found = {"runs": [stock, ours | more], "machine": {"cpu_isa": "avx2"}}
    return found | {"agreement": [{"name": more.get("name", "fastft"), "agrees": True}]}


@pytest.mark.parametrize(
    ("bare", "verdict"),
    [
        (None, "**no**"),
        ((2.8, 2.7, 2.9), "bounded: the bare work alone allows 2.90"),
        ((2.8, 2.7, 3.1), "**no**"),  # it may allow the goal
        ((2.35, 2.3, 2.38), "bounded: the bare work alone allows 2.40"),  # which was seen
        ((2.0, 1.9, 2.1), "**no**"),  # whoever beats it is not bounded by it
    ],
)
def test_the_goals_of_a_training(bare: tuple[float, float, float] | None, verdict: str) -> None:
    found = trained()
    if bare is not None:
        found["bare_work"] = {"times_faster": bare[0], "quartiles": [*bare[1:]]}
    speed, peak = goals.judge_training("whole_smollm2", found)
    assert (speed.goal, speed.found, speed.verdict) == (
        "at least 3",
        "2.40 (2.30 to 2.50)",
        verdict,
    )
    assert (peak.goal, peak.found, peak.verdict) == ("at most 50%", "49.0%", "yes")


def test_a_training_reaches_a_goal_for_sure_and_with_its_losses() -> None:
    def reached(found: dict[str, Any]) -> list[bool]:
        return [each.reached for each in goals.judge_training("whole_smollm2", found)]

    assert reached(trained(times_faster=3.1, quartiles=[3.0, 3.2])) == [True, True]
    assert reached(trained(times_faster=3.1, quartiles=[2.9, 3.3])) == [False, True]
    other = trained(times_faster=3.1, quartiles=[3.0, 3.2])
    other["agreement"][0]["agrees"] = False
    assert reached(other) == [False, False]
    # what an older measurement calls what is done unasked today
    assert reached(trained(name="fastft, linear=True", times_faster=3.4, quartiles=[3.3, 3.5]))[0]


def test_a_training_without_stock_or_ours_has_no_goals() -> None:
    found = trained()
    assert goals.judge_training("whole_demo", found | {"runs": found["runs"][:1]}) == []
    assert goals.judge_training("whole_demo", found | {"runs": found["runs"][::-1]}) == []


def test_the_page_of_results_is_what_is_made_of_the_recorded_rows() -> None:
    assert report.PAGE.read_text() == report.page(), "python benchmarks/report.py"


@pytest.mark.parametrize("path", list(report.pages()), ids=lambda path: path.name)
def test_the_tables_of_a_page_are_what_was_recorded(path: Path) -> None:
    assert path.read_text() == report.with_figures(path.read_text()), "python benchmarks/report.py"


def test_losses_against_a_rival_stay_in_the_table() -> None:
    rows = [
        row for path in report.machines().values() for row in report.rows_by_name(path).values()
    ]
    slower = [
        row for row in rows if min((row.get("times_faster_than") or {"": 1}).values()) < 0.995
    ]
    page = report.PAGE.read_text()
    assert slower
    for row in slower:
        assert re.search(rf"^\| {re.escape(row['name'])} \|.*\*\*0\.", page, re.MULTILINE), row


# a ratio, a share, milliseconds, a peak, a speed
FIGURE = re.compile(
    r"(?<![\w.,/-])(\d[\d,]*(?:\.\d+)?)(?: to (\d[\d,]*(?:\.\d+)?))?\s?"
    r"(x(?!\w)(?! \d)|%|ms\b|µs\b|MiB\b|tokens/s\b|times (?:as|the|less|more|faster|what)\b)"
)
MADE = re.compile(r"<!-- (?!to here|end)[^>]*-->.*?<!-- (?:to here|end) -->", re.DOTALL)
QUOTED = re.compile(r"^```.*?^```|^(?: {4}|\t).*?$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
PUBLISHED = "As they have published it"  # a section of what others say of themselves


def sections(page: Path) -> Iterator[str]:
    """What is neither made of results nor quoted."""
    text = MADE.sub("", page.read_text())
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        if PUBLISHED not in section:
            yield section


def numbers_of(path: Path) -> set[float]:
    """All that a file of results has."""
    text = path.read_text()
    if path.suffix == ".md":
        return {float(each.replace(",", "")) for each in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}
    return set(map(float, re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)))


def unfounded(page: Path) -> list[str]:
    """The figures of a page that no file of results has to which their section leads."""
    found = []
    for section in sections(page):
        targets = re.findall(r"\]\(([^)#]*benchmarks/results/[^)#]+\.(?:md|json))", section)
        known = {n for target in targets for n in numbers_of((page.parent / target).resolve())}
        for figure in FIGURE.finditer(QUOTED.sub("", section)):
            for text in filter(None, figure.group(1, 2)):
                digits = len(text.partition(".")[2])
                value = float(text.replace(",", ""))
                shares = (1, 100) if figure[3] == "%" else (1,)
                if not any(round(n * s, digits) == value for n in known for s in shares):
                    found.append(f"{section.splitlines()[0]}: {figure[0]}")
    return found


@pytest.mark.parametrize("page", documentation.PAGES, ids=lambda page: page.name)
def test_every_figure_is_found_in_the_results(page: Path) -> None:
    """It stands in a table that benchmarks/report.py makes, or its section links the file that has
    it; a number that was chosen and not measured is written as code."""
    if page.name != "CHANGELOG.md":  # what a figure was when that version was made
        assert unfounded(page) == []


def test_a_figure_that_nobody_measured_is_found(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "a.json").write_text(json.dumps({"speed": 2.717, "share": 0.42}))
    page = tmp_path / "page.md"
    text = "# Fast\n\n2.72x at 42 % ([a](benchmarks/results/a.json)), {}.\n\n# Other\n\n`7 MiB`\n"
    page.write_text(text.format("as 16 x 1024 are"))
    assert unfounded(page) == []
    page.write_text(text.format("2.9x") + "\n2.72x\n")
    assert unfounded(page) == ["# Fast: 2.9x", "# Other: 2.72x"]


def test_a_marker_without_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="no result has a row like 'adamw"):
        report.block("times", "adamw[no_such_case]")


def test_rows_of_a_name_are_merged_with_those_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = pytest.importorskip("record")
    monkeypatch.setattr(sys, "argv", ["record.py", "--rows", "a b"])
    path, where = tmp_path / "op.json", {"commit": "abc"}
    record.write(path, where, [{"name": "one", "x": 1}, {"name": "two", "x": 1}], keep_others=False)
    record.write(path, {"commit": "def"}, [{"name": "two", "x": 2}], keep_others=True)
    one, two = json.loads(path.read_text())["rows"]
    assert (one["x"], one["commit"], two["x"], two["commit"]) == (1, "abc", 2, "def")
    assert two["command"] == "python benchmarks/record.py --rows 'a b'"


def test_of_two_measurements_of_the_same_code_the_steadier_stays(tmp_path: Path) -> None:
    record = pytest.importorskip("record")
    path = tmp_path / "op.json"

    def found(**spreads: float) -> list[dict[str, Any]]:
        return [{"name": name, "spread": spread} for name, spread in spreads.items()]

    old = found(steady=0.02, loose=0.3, failed=0.2, again=0.4)
    record.write(path, {"commit": "abc", "sources": "s"}, old, keep_others=False)
    assert record.scattering(path) == ["--row=loose", "--row=failed", "--row=again"]
    new = found(loose=0.04, failed=0.5, again=0.4)
    record.write(path, {"commit": "def", "sources": "s"}, new, True, keep_steadier=True)
    kept = {row["name"]: (row["spread"], row["commit"]) for row in record.rows_of_file(path)}
    assert kept == {
        "steady": (0.02, "abc"),
        "loose": (0.04, "def"),
        "failed": (0.2, "abc"),
        "again": (0.4, "abc"),
    }
    record.write(path, {"commit": "ghi", "sources": "t"}, new, True, keep_steadier=True)
    failed = next(row for row in record.rows_of_file(path) if row["name"] == "failed")
    assert failed["commit"] == "ghi"  # other code


def test_goals_and_rows_choose_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["test_adamw[50M_fp32]", "test_adamw[400_mixed]", "test_stream[8]"]

    def chosen(**options: Any) -> list[str]:
        items = [SimpleNamespace(name=name) for name in names]
        config = SimpleNamespace(getoption=lambda option: options.get(option.lstrip("-")))
        of_benchmarks().pytest_collection_modifyitems(config, items)
        return [item.name for item in items]

    assert chosen(goals=True, rows="") == names[:2]
    assert chosen(goals=False, rows="[50M") == names[:1]
    assert chosen(rows="", row=["stream[8]", "adamw"]) == names[2:]


def of_benchmarks() -> Any:
    """Their conftest, whose name tests have too."""
    import importlib.util

    path = ROOT / "benchmarks" / "conftest.py"
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_rows_of_a_day_with_a_gpu_are_filed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = pytest.importorskip("record")
    ledger = record.Ledger(tmp_path / "stub.jsonl")
    ledger.append(part="machine", facts={"gpu": "Stub H100 80GB", "commit": None})
    case = "benchmarks/test_adamw.py::test_adamw[50M_fp32]"
    found = {"median_ms": {"ours": 2.0}, "times_faster_than": {}}
    ledger.append(part="ops", case=case, outcome="passed", found=found)
    ledger.append(
        part="ops", case="benchmarks/test_plan.py::test_plan", outcome="failed", said="no"
    )
    monkeypatch.setattr(record.report, "RESULTS", tmp_path)
    assert record.taken(ledger.path) == ["benchmarks/test_plan.py::test_plan failed: no"]
    (row,) = json.loads((tmp_path / "stub-h100-80gb" / "adamw.json").read_text())["rows"]
    assert row["name"] == "adamw[50M_fp32]" and row["median_ms"] == {"ours": 2.0}


@pytest.mark.parametrize(
    ("spread", "high", "reached", "found"),
    [
        (0.04, 1.3, True, "20.00"),
        (0.2, 1.3, True, "20.00; scatters, at worst 15.38"),
        (0.2, 1.4, False, "20.00; scatters, at worst 14.29"),
    ],
)
def test_what_scatters_reaches_a_goal_by_its_worse_quartiles(
    spread: float, high: float, reached: bool, found: str
) -> None:
    row = {
        "median_ms": {"ours": 1.0, "bitsandbytes": 20.0},
        "quartiles_ms": {"ours": [0.9, high], "bitsandbytes": [20.0, 21.0]},
        "times_faster_than": {"bitsandbytes": 20.0},
        "spread": spread,
    }
    (judged,) = goals.judge({"adamw_8bit[float32]": row})
    assert (judged.reached, judged.found) == (reached, found)


def test_a_ratio_that_was_kept_turn_for_turn_is_judged_by_its_own_quartile() -> None:
    times = {"ours": [1.0, 2.0], "bitsandbytes": [20.0, 40.0]}
    row = {"median_ms": {"ours": 1.5}, "quartiles_ms": times, "spread": 0.2}
    row |= {"times_faster_than": {"bitsandbytes": 20.0}}
    row |= {"ratio_quartiles": {"bitsandbytes": [17.0, 21.0]}}
    (judged,) = goals.judge({"adamw_8bit[float32]": row})
    assert judged.reached and judged.found == "20.00; scatters, at worst 17.00"
    row["ratio_quartiles"] = {"bitsandbytes": [18.1, 20.0]}  # within 10 % of the median
    (judged,) = goals.judge({"adamw_8bit[float32]": row})
    assert judged.reached and judged.found == "20.00"


def test_results_and_pages_leave_a_commit_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement writes them; that they differ tells nothing of the code it ran."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    files = ["benchmarks/results/m/adamw.json", "docs/adamw.md", "README.md", "fastft/adamw.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    clean = machine.commit()
    assert clean and not clean.endswith("-dirty")
    for name in files[:-1]:
        (tmp_path / name).write_text("2")
    assert machine.commit() == clean
    (tmp_path / files[-1]).write_text("2")
    assert machine.commit() == f"{clean}-dirty"


@pytest.fixture
def whole_runs() -> Any:
    pytest.importorskip("transformers")
    return pytest.importorskip("whole_runs")


def test_a_step_is_timed_without_the_turns_of_others(
    whole_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waits = [0.0], []

    def others() -> None:
        now[0] += 100
        waits.append(len(recorder.run.seconds))

    recorder = whole_runs.Recorder(others, 4)
    monkeypatch.setattr(whole_runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    recorder.on_train_begin()
    for _ in range(8):
        now[0] += 1
        recorder.on_step_end()
    assert recorder.run.seconds == [1] * 8
    assert waits == [0, 4, 8]


def test_two_turns_are_the_least(whole_runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained that nobody could compare."""
    monkeypatch.setattr(sys, "argv", ["whole_runs.py", "demo", "--steps", "3", "--to", "x"])
    with pytest.raises(SystemExit) as refused:
        whole_runs.main()
    assert refused.value.code == 2 and not Path("x").exists()


def test_steps_that_others_have_been_before_do_not_count(whole_runs: Any) -> None:
    """Nor those of the first turn."""
    turn, times, runs = 7, {"stock": 6.0, "fastft": 2.0}, {}
    workload = whole_runs.Workload("", Path(), [], 3 * turn, turn)
    for name, seconds in times.items():
        steps = [99.0] * turn + 2 * [99.0, 99.0, *[seconds] * (turn - 2)]
        tokens = [1000 if each == 99.0 else 12 for each in steps]
        runs[name] = whole_runs.Run([1.0] * len(steps), steps, [*tokens, 1000], 10**6, 1)
    row = whole_runs.compared(workload, [runs])["runs"][1]
    assert row["times_faster"] == 3 and row["tokens_per_second"] == 6


def test_rounds_count_together(whole_runs: Any) -> None:
    """The ratio of the same step of the same round; losses of every round; the middle peak."""
    turn, rounds = 3, []
    workload = whole_runs.Workload("", Path(), [], 2 * turn, turn)
    for stock, ours, peak, loss in ((6.0, 2.0, 4, 1.0), (8.0, 1.0, 9, 1.0), (9.0, 9.0, 5, 1.5)):
        steps = {"stock": [stock] * 2 * turn, "fastft": [ours] * 2 * turn}
        losses = {"stock": [1.0] * 2 * turn, "fastft": [1.0] * (2 * turn - 1) + [loss]}
        rounds.append(
            {
                name: whole_runs.Run(losses[name], times, [3] * 2 * turn, 36, peak)
                for name, times in steps.items()
            }
        )
    found = whole_runs.compared(workload, rounds)
    stock, ours = found["runs"]
    assert ours["times_faster"] == 3 and ours["quartiles"] == [1.5, 6.75]
    assert stock["seconds"] == 46 and ours["tokens_per_second"] == 18 / 24
    assert stock["peak_bytes"] == ours["peak_bytes"] == 5 and ours["padding"] == 0.5
    assert found["agreement"][1] == {
        "name": "fastft",
        "largest_difference": 0.5,
        "agrees": False,
    }


def test_there_is_a_round(whole_runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["whole_runs.py", "demo", "--rounds", "0", "--to", "x"])
    with pytest.raises(SystemExit) as refused:
        whole_runs.main()
    assert refused.value.code == 2 and not Path("x").exists()


def test_the_bare_work_of_a_step_is_its_linear_layers_and_the_head(
    whole_runs: Any, tmp_path: Path
) -> None:
    """As torch counts the products of stock's step, whose head has a row for each token; and of the
    head as many as labels count."""
    import torch
    from bare_step import BareTrainer, layers_of
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=2, **sizes))
    ids = torch.arange(3, 51).view(3, 16)
    labels = ids.masked_fill(ids % 4 == 0, -100)
    counted = int((labels[:, 1:] != -100).sum())

    def products(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        of = counter.get_flop_counts()["Global"]
        return sum(of.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))

    trainer = BareTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    batch = {"input_ids": ids, "labels": labels}
    stock = products(lambda: model(**batch).loss.backward())
    spared = 6 * (ids.numel() - counted) * 61 * 16
    assert products(lambda: trainer.training_step(model, batch)) == stock - spared
    assert layers_of(model, 48, counted) == {
        (48, 16, 16): 8,
        (48, 24, 16): 4,
        (48, 16, 24): 2,
        (counted, 61, 16): 1,
    }


@pytest.mark.slow
def test_whole_runs_by_turns(
    whole_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both train to the end with the same losses; whoever fails stops no other."""
    from support.plugged import tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    rows = [list(range(3, 3 + length)) for length in (5, 9, 17, 4) * 5]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    broken = whole_runs.Variant("broken", sft={"no_such_option": 1})
    monkeypatch.setitem(whole_runs.VARIANTS, "broken", broken)
    workload = whole_runs.Workload("tiny", tmp_path, examples, 6, 3, batch=4)
    failed: dict[str, str] = {}
    runs = whole_runs.by_turns(["stock", "broken", "bare", "fastft"], workload, 6, failed)
    assert list(runs) == ["stock", "bare", "fastft"] and list(failed) == ["broken"]
    assert [len(run.seconds) for run in runs.values()] == [6, 6, 6]
    found = whole_runs.compared(workload, [runs])
    assert [run["name"] for run in found["runs"]] == ["stock Trainer", "fastft"]
    assert set(found["bare_work"]) == {"name", "times_faster", "quartiles"}
    assert all(line["agrees"] for line in found["agreement"])
    assert found["runs"][0]["padding"] > 0 and found["runs"][1]["padding"] == 0
