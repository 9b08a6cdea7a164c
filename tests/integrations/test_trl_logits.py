"""TRL's experimental trainers that read `outputs.logits`: the same losses, metrics and evaluations
as stock, and nothing as large as logits is ever made, a teacher's or a reference's included."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.watch import Watch

import fastft
from fastft.loss import head_sweep

trl = pytest.importorskip("trl", minversion="1.16")
from support.logits_trainers import STEPS, WIDE, trainer_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL
# what differs from run to run, and what only a run with fastft logs
MEASURED = ("time", "second", "epoch", "memory", "fastft/")


def trained(folder, member, monkeypatch, *, fused, **changes):
    """A training's numbers, the elements of the largest tensor that it made outside `generate`, its
    callback and its trainer."""
    trainer, callback = trainer_of(folder, member, **changes), fastft.FusedLossCallback()
    if fused:
        trainer.add_callback(callback)
    torch.manual_seed(3)
    seen, generate = Watch(), transformers.GenerationMixin.generate

    def unwatched(*args, **options):
        before = seen.elements
        result = generate(*args, **options)
        seen.elements = before
        return result

    with seen, monkeypatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", unwatched)
        trainer.train()
    numbers = [
        {
            name: value
            for name, value in entry.items()
            if isinstance(value, int | float) and not any(word in name for word in MEASURED)
        }
        for entry in trainer.state.log_history
    ]
    numbers = [entry for entry in numbers if entry.keys() - {"step", "total_flos"}]
    return numbers, seen.elements, callback, trainer


def compare(folder, member, monkeypatch, tolerance=1e-6, **changes):
    """Trains stock and fused; returns what `trained` does of the fused one."""
    monkeypatch.setitem(head_sweep._LIMITS, "cpu", (0, 8, 1 << 31, 0))
    expected, stock_elements, *_ = trained(folder, member, monkeypatch, fused=False, **changes)
    ours, elements, callback, trainer = trained(folder, member, monkeypatch, fused=True, **changes)
    assert len(ours) == len(expected) > STEPS
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    assert callback.report.fused >= STEPS and not callback.report.materialised
    assert not callback.evaluation.materialised and not callback.report.skipped
    assert elements <= 32 * WIDE < stock_elements
    return callback, trainer


OTHERS = pytest.mark.way("TPO, GOLD, SDFT, A*-PO, Online DPO (TRL)", loss="exact")
CASES = [
    *(
        pytest.param(name, marks=pytest.mark.way(f"{name} (TRL)", loss="exact"))
        for name in ("ORPO", "CPO", "GKD")
    ),
    # the trainer is CPO's
    pytest.param("SimPO", marks=[pytest.mark.slow, pytest.mark.way("SimPO (TRL)", loss="exact")]),
    *(
        pytest.param(name, marks=[pytest.mark.slow, OTHERS])
        for name in ("TPO", "GOLD", "SDFT", "A*-PO", "Online DPO")
    ),
]


@pytest.mark.parametrize("member", CASES)
def test_trains_and_evaluates_as_stock_without_logits(tmp_path, member, monkeypatch):
    compare(tmp_path, member, monkeypatch)


@pytest.mark.slow
@pytest.mark.way("SDPO (TRL)", loss="works")
def test_the_mass_outside_the_top_k_rounds_differently(tmp_path, monkeypatch):
    """SDPO takes 1 less the probabilities of the best tokens, and so magnifies their rounding."""
    compare(tmp_path, "SDPO", monkeypatch, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1}])
def test_divergences_of_gkd(tmp_path, changes, monkeypatch):
    compare(tmp_path, "GKD", monkeypatch, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("member", ["Online DPO", "SDFT", "CPO"])
def test_the_model_without_its_adapters_is_the_reference(tmp_path, member, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    compare(tmp_path, member, monkeypatch, options={"peft_config": config})


@pytest.mark.slow
def test_plug_says_that_it_is_fused(tmp_path):
    trainer = trainer_of(tmp_path, "ORPO")
    plug = fastft.plug(trainer)
    trainer.train()
    assert plug.lines["loss"] == "fused at lm_head"


def test_what_is_left_after_a_training_is_stock(tmp_path, monkeypatch):
    _, _, callback, trainer = trained(tmp_path, "GKD", monkeypatch, fused=True)
    heads = trainer.model.lm_head, trainer.teacher_model.lm_head
    assert callback.report.fused and all("forward" not in vars(head) for head in heads)
