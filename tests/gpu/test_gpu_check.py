"""The day with a GPU, rehearsed: each part of `make gpu-check` starts, is timed, is cut off and
keeps its results."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.gpu_checkout import COMPUTE_SANITIZER, GPU, ROOT, Checkout, lines, lives

sys.path.append(str(ROOT / "benchmarks"))  # behind the tests: some names are in both

import bounded
import compare
import gpu_report
import one_by_one
from ledger import Ledger

ESTIMATES = """# What the GPU kernels cost

* **at least**: an ESTIMATE in ms, never measured

## CUDA: compiled by nvcc 13.0.88

| kernel | chip | instructions | at least (estimate) |
|---|---|---|---|
| cross-entropy, plain, bf16, V=128256 (a logit) | sm_80 | 54.5 | 8,192 rows: A100 2.94 (instructions) |
| cross-entropy, plain, bf16, V=128256 (a logit) | sm_90 | 54.5 | 8,192 rows: H200 0.9 (memory), H100 1.2 (memory) |
| AdamW, exact, moments fp32 (a parameter) | sm_90 | 66.0 | 1e9 parameters: H200 5.9 (memory), H100 6.5 (memory) |
| AdamW, upload of a table (a word) | sm_90 | 5.0 | |

## Triton: compiled by Triton 3.7.1

| kernel | chip | instructions | at least (estimate) |
|---|---|---|---|
| cross-entropy, plain, bf16, V=128256 (a logit) | sm_90 | 37.0 | 8,192 rows: H200 1,234.5 (memory), H100 2 (memory) |

| a table without | chip |
|---|---|
| cross-entropy, plain, bf16, V=32000 | H100 5.0 |
"""  # noqa: E501


def outcomes(path: Path) -> dict[str, str]:
    found = {}
    for line in lines(path):
        if "case" in line:
            name = line["case"].partition("::")[2] or line["case"]
            # as pytest-xdist calls what is in a group
            found[name.removesuffix("@last")] = line["outcome"]
    return found


def test_all_parts_of_a_good_day(tmp_path: Path) -> None:
    """Without git, nvcc and $OUT; the estimates stand beside what was measured."""
    checkout = Checkout(tmp_path, goes_wrong=False)
    (checkout.results / "kernels.md").write_text(ESTIMATES)
    ran = checkout.check("--seconds", "120")
    assert ran.status == 0, ran.printed
    stem = checkout.results / GPU
    table = stem.with_suffix(".md").read_text()
    assert (
        "| cuda, cross-entropy, plain, bf16, V=128256 | 1.5 | 1.2 | 1.25 |" in table
        and table in ran.printed + table
    )
    assert "| cuda, AdamW, exact, moments fp32 | 7.0 | 6.5 | 1.08 |" in ran.printed
    assert "* commit: None" in table and "torch: 2.11.0+stub" in table
    assert "built for 90\n" in stem.with_suffix(".log").read_text()
    done = [line["part"] for line in lines(stem.with_suffix(".jsonl")) if "took" in line]
    assert done == ["machine", "build", "smoke", "tests", "sanitize", "ops", "train"]
    assert set(outcomes(stem.with_suffix(".jsonl")).values()) == {"passed", "skipped"}
    assert "skipped: the host has 1 GiB available" in table
    assert "skipped  compute-sanitizer[memcheck]: no compute-sanitizer is found" in ran.printed
    assert 'tests="5"' in (checkout.results / f"{GPU}-tests.xml").read_text()
    assert {path.name for path in checkout.results.iterdir()} == {
        "kernels.md",
        f"{GPU}.md",
        f"{GPU}.log",
        f"{GPU}.jsonl",
        f"{GPU}-tests.xml",
    }


def test_cases_that_crash_fail_and_hang_stop_no_other(tmp_path: Path) -> None:
    checkout, out = Checkout(tmp_path, goes_wrong=True), tmp_path / "out"
    ran = checkout.check("ops", "smoke", "--seconds", "36", out=out)
    path = out / f"{GPU}-smoke-ops.jsonl"
    assert ran.status == 1 and outcomes(path) == {
        "test_first": "passed",
        "test_that_crashes": "died",
        "test_last": "passed",
        "benchmarks/test_attention.py": "failed",
        "test_right": "passed",
        "test_wrong": "failed",
        "test_that_spoils_the_context": "failed",
        "test_that_hangs": "hung",
        "test_after_all": "passed",
    }
    by_case = {
        line["case"].partition("::")[2]: line
        for line in lines(path)
        if line.get("outcome", "begun") != "begun"
    }
    # the events' time alone
    assert by_case["test_right"]["found"]["median_ms"] == {"ours": 2.0, "rival": 4.0}
    assert by_case["test_right"]["found"]["host_ms"]["ours"] < 2.0
    assert by_case["test_wrong"]["found"] == {"peak_mib": {"ours": 5.0}}
    table = path.with_suffix(".md").read_text()
    for said in (
        "test_wrong failed: RuntimeError: out of memory",
        "test_that_spoils_the_context failed: RuntimeError: CUDA error",
        "status 11",
        "No module named 'no_such_module'",
    ):
        assert said in table and said in ran.printed
    assert not any(checkout.results.iterdir())
    assert len(checkout.children()) == 1 and not any(map(lives, checkout.children()))


def test_what_compute_sanitizer_reports_is_a_failure(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, goes_wrong=False)
    checkout.put("tools/compute-sanitizer", textwrap.dedent(COMPUTE_SANITIZER))
    (tmp_path / "tools" / "compute-sanitizer").chmod(0o755)
    ran = checkout.check("sanitize", "--seconds", "60", out=tmp_path / "out")
    stem = tmp_path / "out" / f"{GPU}-sanitize"
    assert ran.status == 1 and outcomes(stem.with_suffix(".jsonl")) == {
        "compute-sanitizer[memcheck]": "passed",
        "compute-sanitizer[racecheck]": "failed",
    }
    assert f"compute-sanitizer[racecheck]: {stem.name}.log has its reports" in ran.printed
    log = stem.with_suffix(".log").read_text()
    assert log.count("launched") == 2 and "Race reported" in log


def test_the_launches_for_compute_sanitizer_launch_here() -> None:
    module("launches").main()


def test_tests_that_hang_are_ended_with_their_children(tmp_path: Path) -> None:
    """What the others have found is kept, by pytest too; a test without its end has one."""
    checkout = Checkout(tmp_path, goes_wrong=True)
    ran = checkout.check("tests", "--seconds", "30", out=tmp_path / "out", behind=True)
    found = outcomes(tmp_path / "out" / f"{GPU}-tests.jsonl")
    assert (
        ran.status == 1
        and found["test_that_hangs"] == "cut off"
        and found["test_quick[2]"] == "failed"
    )
    assert [found[f"test_quick[{n}]"] for n in (0, 1, 3)] == ["passed"] * 3
    assert 'failures="1"' in (tmp_path / "out" / f"{GPU}-tests-tests.xml").read_text()
    assert "AssertionError: two is wrong" in (tmp_path / "out" / f"{GPU}-tests.md").read_text()
    assert len(checkout.children()) == 1 and not any(map(lives, checkout.children()))


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_a_part_ends_when_its_time_is_over(behind: bool, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, goes_wrong=True)
    ran = checkout.check("train", "--seconds", "6", out=tmp_path / "out", behind=behind)
    ended = [line for line in lines(tmp_path / "out" / f"{GPU}-train.jsonl") if "took" in line]
    assert ran.status == 1 and 1 < ran.seconds < 60 and sum(line["took"] for line in ended) < 7
    assert "training[fastft] cut off: not finished after" in ran.printed
    assert len(checkout.children()) == 1 and not any(map(lives, checkout.children()))


def test_a_check_that_is_terminated_ends_what_it_runs_and_keeps_what_it_has(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, goes_wrong=True)
    environment = checkout.environment(tmp_path)
    process = subprocess.Popen(
        checkout.command("train"), env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not checkout.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert outcomes(tmp_path / f"{GPU}-train.jsonl")["training[stock]"] == "passed"
    assert outcomes(tmp_path / f"{GPU}-train.jsonl")["training[fastft]"] == "cut off"
    assert "| training[stock] | 9.0 |" in (tmp_path / f"{GPU}-train.md").read_text()
    assert checkout.children() and not any(map(lives, checkout.children()))


def test_no_gpu_is_one_sentence(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, goes_wrong=False)
    checkout.put(
        "stub/torch/__init__.py",
        (tmp_path / "stub/torch/__init__.py").read_text() + "\ncuda.is_available = bool\n",
    )
    ran = checkout.check(out=tmp_path / "out")
    assert ran.status == 1 and "sees no CUDA device" in ran.printed.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu-check.log"]


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    ran = Checkout(tmp_path, goes_wrong=False).check("test")
    assert (
        ran.status == 2
        and "a part must be one of smoke, tests, sanitize, ops, train, got test" in ran.printed
    )


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    leaving = f"sleep 300 & echo $! > {tmp_path}/child"
    ended = bounded.run(["sh", "-c", leaving], seconds=30)
    assert (ended.status, ended.why) == (0, "") and not lives(int((tmp_path / "child").read_text()))


def test_a_command_that_ignores_its_end_is_ended() -> None:
    ended = bounded.run(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(300)",
        ],
        seconds=1.0,
    )
    assert (
        ended.status == -signal.SIGKILL
        and ended.why == "not finished after 1 s"
        and ended.seconds < 10
    )


def test_a_process_whose_context_is_spoilt_tests_no_more(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else all that it has yet to run would fail for what one kernel has done."""
    places = {
        getattr(plugin, "__file__", None): plugin
        for plugin in pytestconfig.pluginmanager.get_plugins()
    }
    setup = places[str(ROOT / "tests" / "conftest.py")].pytest_runtest_setup

    def spoilt() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    item, left = (
        SimpleNamespace(nodeid="test_next", get_closest_marker=lambda name: name == "gpu"),
        [],
    )
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", spoilt)
    monkeypatch.setattr(os, "_exit", left.append)
    setup(item)
    assert (
        left == [70]
        and "test_next has not run, an earlier test has left this" in capfd.readouterr().err
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    setup(item)
    assert left == [70]


def test_half_a_line_is_no_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "lines")
    ledger.append(part="ops", case="a", outcome="passed")
    with ledger.path.open("a") as file:
        file.write('{"part": "ops", "case": "b", "outc')
    assert list(ledger.cases("ops")) == ["a"]


@pytest.mark.parametrize(
    ("kernel", "gpu", "ms"),
    [
        ("cuda, cross-entropy, plain, bf16, V=128256", "NVIDIA H100 80GB HBM3", 1.2),
        ("cuda, cross-entropy, plain, bf16, V=128256", "NVIDIA A100-SXM4-80GB", 2.94),
        ("triton, cross-entropy, plain, bf16, V=128256", "NVIDIA H200", 1234.5),
        ("triton, cross-entropy, plain, bf16, V=128256", "NVIDIA A100-SXM4-80GB", None),
        ("cuda, cross-entropy, plain, bf16, V=32000", "NVIDIA H100 80GB HBM3", None),
        ("cuda, AdamW, upload of a table", "NVIDIA H100 80GB HBM3", None),
    ],
)
def test_the_estimate_of_a_kernel(tmp_path: Path, kernel: str, gpu: str, ms: float | None) -> None:
    (tmp_path / "kernels.md").write_text(ESTIMATES)
    assert gpu_report.estimate_of(kernel, gpu, gpu_report.estimates(tmp_path / "kernels.md")) == ms


def test_no_estimates_without_their_file(tmp_path: Path) -> None:
    assert gpu_report.estimates(tmp_path / "kernels.md") == []


class Clock:
    """A device's queue: whoever writes, works."""

    def __init__(self) -> None:
        self.now = 0.0

    def event(self, enable_timing: bool) -> Any:
        clock = self

        class Event:
            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()


def test_a_gpu_is_busy_until_all_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half a second of sweeps, the device begins the run after the host has launched it."""
    clock, sweeps = Clock(), []

    class Sweep:
        def zero_(self) -> None:
            sweeps.append(None)
            clock.now += 0.01

    def run() -> None:
        clock.now += 3.0

    monkeypatch.setattr(compare, "DEVICE", "cuda")
    monkeypatch.setattr(compare, "_sweep", lambda: (Sweep(), 0.01))
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    took = compare.timed(run, expected_host=0.25)
    assert took.seconds == pytest.approx(3.0) and took.host < 1.0
    assert len(sweeps) == 51


def module(name: str) -> ModuleType:
    """One of the benchmarks' whose name a test has too."""
    spec = importlib.util.spec_from_file_location(
        f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py"
    )
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_smoke_cases_are_right_on_this_machine() -> None:
    """Its own engines do what those of a GPU will be asked for."""
    smoke, found = module("test_smoke"), []

    def keep(name: str, value: dict[str, Any]) -> None:
        found.append(value)

    smoke.test_ceilings(keep)
    for engine in smoke.engines(smoke.ROWS):
        smoke.test_cross_entropy_rows(engine, keep)
    for engine in smoke.engines(smoke.ADAMW):
        for rounding, moments in smoke.WAYS:
            smoke.test_adamw(engine, rounding, moments, keep)
        smoke.test_adamw_with_states_on_the_host(engine, keep)
    for engine in smoke.engines(smoke.GRAD_NORM):
        smoke.test_norm_of_gradients(engine, keep)
    for engine in smoke.engines(smoke.BOUNDARIES):
        smoke.test_boundaries(engine, keep)
    for name in smoke.LOSSES:
        smoke.test_head(name, keep)
    for engine in smoke.ATTENTION:
        smoke.test_attention(engine, keep)
    assert all(each["ms"] > 0 for each in found if "kernel" in each) and len(found) == 14


def test_the_training_is_stocks() -> None:
    training = pytest.importorskip("training")
    stock, ours = (training.train(variant) for variant in ("stock", "fastft"))
    assert len(stock["losses"]) == training.STEPS and stock["losses"][-1] < stock["losses"][0]
    assert training.disagreement(ours["losses"], stock["losses"]) == ""
    off = [*stock["losses"][:-1], 2 * stock["losses"][-1]]
    assert training.disagreement(off, stock["losses"]).startswith(
        f"the loss of step {training.STEPS} is"
    )
    assert training.disagreement(off[:-1], stock["losses"]) == "5 losses, stock has 6"


@pytest.mark.parametrize("offload", ["states", "gradients"])
def test_the_training_of_a_small_card_is_the_resident_one(offload: str) -> None:
    offloading = pytest.importorskip("offloading")
    assert offloading.missing(offload) is None
    found = offloading.both(offload, 24 << 30)
    assert len(set(found["losses"])) == offloading.STEPS
    assert offloading.disagreement(found) == ""
    found["bits"][0] += 1
    assert "1 of 21 weights end with other bits" in offloading.disagreement(found)
    found["losses"][2] += 1e-3
    assert offloading.disagreement(found).startswith("the loss of step 3 is")


def test_the_two_trainings_repeat_what_attention_on_a_gpu_would_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offloading = pytest.importorskip("offloading")
    modes: list[bool] = []

    def both(offload: str, cap: int) -> dict[str, Any]:
        modes.append(torch.are_deterministic_algorithms_enabled())
        return {"losses": [], "bits": [], "resident": {"losses": [], "bits": []}}

    monkeypatch.setattr(offloading, "both", both)
    monkeypatch.setattr(sys, "argv", ["offloading.py"])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        offloading.main()
    finally:
        torch.use_deterministic_algorithms(False)
    assert modes == [True]


@pytest.mark.parametrize(
    ("device", "host", "words"),
    [
        (60 << 30, 1 << 40, "resident it needs 74 GiB of the device, which has 60 free"),
        (1 << 40, 50 << 30, "it needs 59 GiB of the host, which has 50 available"),
        (1 << 40, 1 << 40, None),
    ],
)
def test_a_machine_that_is_too_small_for_8_billion_says_so(
    monkeypatch: pytest.MonkeyPatch, device: int, host: int, words: str | None
) -> None:
    offloading = pytest.importorskip("offloading")
    monkeypatch.setattr(offloading, "GPU", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (device, 1 << 41))
    monkeypatch.setattr(offloading, "available", lambda: host)
    assert offloading.missing("gradients") == words


def test_heads_of_a_real_size_are_not_multiplied_in_fp32_on_a_gpu() -> None:
    with pytest.raises(pytest.skip.Exception, match="nobody trains such a head in fp32"):
        heads = pytest.importorskip("heads")
        heads.make("cuda", torch.float32, heads.WHOLE)


def test_recording_keeps_what_was_measured_before_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record = pytest.importorskip("record")
    report = pytest.importorskip("report")

    def run(files: list[Path], ledger: Ledger, part: str, **options: object) -> str:
        found = {"median_ms": {"ours": 2.0}, "times_faster_than": {"rival": 1.5}}
        ledger.append(part=part, case=f"{files[0]}::test_one", outcome="passed", found=found)
        ledger.append(
            part=part, case=f"{files[0]}::test_two", outcome="failed", said="E   MemoryError"
        )
        return ""

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "write", lambda: None)
    monkeypatch.setattr(record.machine, "name", lambda facts: "here")
    monkeypatch.setattr(one_by_one, "run", run)
    monkeypatch.setattr(sys, "argv", ["record.py", "--only", "adamw"])
    monkeypatch.setenv("PATH", "")  # no git
    with pytest.raises(SystemExit, match=r"have failed: .*here/record.jsonl"):
        record.main()
    assert "test_two failed: MemoryError" in capfd.readouterr().out
    recorded = json.loads((tmp_path / "here" / "adamw.json").read_text())
    (row,) = recorded["rows"]
    assert row["name"] == "one" and row["commit"] is None is recorded["machine"]["commit"]
    assert len(lines(tmp_path / "here" / "record.jsonl")) == 2
