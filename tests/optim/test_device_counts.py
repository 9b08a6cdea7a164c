"""Step counts on the device, with the CPU in its place."""

from __future__ import annotations

import pytest
import torch
from support.adamw_modes import MODES
from support.adamw_problems import Training
from support.adamw_steps import ENGINES, assert_same_bits
from torch.nn import Parameter

import fastft
from fastft.optim import device_counts
from fastft.optim.device_counts import DeviceCounts
from fastft.optim.groups import hyper_row

MIXED = MODES["stochastic-bf16"]


@pytest.fixture
def counted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        device_counts, "counted_there", lambda device, groups: any(g["capturable"] for g in groups)
    )


def test_the_hyper_table_is_the_hosts() -> None:
    usual = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "maximize": False,
    }
    groups = [
        usual,
        usual | {"lr": torch.tensor(0.3), "betas": (0.0, torch.tensor(0.95)), "maximize": True},
    ]
    rows = [(0, 0.0), (1, 0.0), (1, 41.0)]
    counts = DeviceCounts(torch.device("cpu"), [0.0, 41.0], rows)
    for done in range(60):
        groups[0] = usual | {"lr": 1e-3 * (done % 5)}
        expected = torch.tensor([hyper_row(groups[index], step + done + 1) for index, step in rows])
        assert torch.equal(counts.hyper(groups, None), expected)
        counts.count()
    assert counts.steps.tolist() == [60.0, 101.0]


@pytest.mark.parametrize("impl", ENGINES)
def test_training_has_the_same_bits(counted_there: None, impl: str) -> None:
    theirs, ours = (
        Training(MIXED, impl, capturable=capturable).step(5) for capturable in (False, True)
    )
    assert ours.optimizer._plan.counts and not theirs.optimizer._plan.counts
    assert_same_bits(ours.values(), theirs.values())


@pytest.mark.parametrize("impl", ENGINES)
def test_what_found_inf_says_is_not_looked_at(counted_there: None, impl: str) -> None:
    class Unseen(torch.Tensor):
        def __bool__(self) -> bool:
            raise AssertionError("the host has waited for the device")

    training = Training(MIXED, impl, capturable=True)
    for step, found in enumerate((0.0, 1.0, 2.0, 0.0)):
        before = training.step(0).values() if step else None
        training.optimizer.found_inf = torch.full((1,), found).as_subclass(Unseen)
        training.step()
        if found:
            assert_same_bits(training.values(), before)
        training.optimizer._skipped = training.optimizer.found_inf.as_subclass(torch.Tensor)
        assert training.optimizer.step_was_skipped == (found > 0)
    assert {float(state["step"]) for state in training.optimizer.state.values()} == {2.0}


def test_a_plan_takes_over_the_counts(counted_there: None) -> None:
    def run(capturable: bool) -> list[torch.Tensor]:
        training = Training(MIXED, "eager", capturable=capturable).step(2)
        training.params[3].grad = None
        training.optimizer.step()
        training.step()
        saved = training.optimizer.state_dict()
        training.optimizer.load_state_dict(saved)
        return training.step(2).values()

    assert_same_bits(run(True), run(False))


def test_what_a_graph_has_captured(counted_there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns have no values before a replay, and its counts are written for as long as it
    lives."""
    monkeypatch.setattr(DeviceCounts, "in_graphs", set())
    training = Training(MIXED, "eager", capturable=True).step()
    (counts,) = training.optimizer._plan.counts.values()
    before = dict(counts._columns)
    training.optimizer.param_groups[0]["lr"] = 0.5
    with monkeypatch.context() as capture:
        capture.setattr(device_counts, "_captured", lambda device: True)
        training.step()
    assert counts._columns == before and counts.in_graphs == {counts}
    training.step()
    assert counts._columns["lr"][0] != before["lr"][0] and counts.in_graphs == {counts}


def test_a_count_that_somebody_sets(counted_there: None) -> None:
    def run(capturable: bool) -> torch.Tensor:
        param = Parameter(torch.ones(3))
        optimizer = fastft.AdamW([param], capturable=capturable)
        for _ in range(3):
            param.grad = torch.full((3,), 0.5)
            optimizer.step()
            optimizer.state[param]["step"].fill_(7.0)
        return param.detach()

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize(
    ("capturable", "needed"),
    [
        (False, "pass capturable=True"),
        (True, "only 'cuda' allows, and here .* computes .* leave step"),
    ],
)
def test_a_graph_over_a_step_that_it_could_only_repeat_is_refused(
    counted_there: None, monkeypatch: pytest.MonkeyPatch, impl: str, capturable: bool, needed: str
) -> None:
    """Nothing has changed afterwards, and steps outside of the graph go on."""
    training, undisturbed = (Training(MIXED, impl, capturable=capturable).step() for _ in range(2))
    before = training.values()
    with monkeypatch.context() as capture:
        capture.setattr(device_counts, "is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=needed):
            training.optimizer.step()
    assert_same_bits(training.values(), before)
    assert_same_bits(training.step().values(), undisturbed.step().values())
