"""TRL's trainers, unchanged, with the fused loss: the losses and metrics of plain logits, which are
never there."""

from __future__ import annotations

import datasets
import pytest

trl = pytest.importorskip("trl", minversion="1.16")
from support.trl_trainers import (  # noqa: E402
    MEMBERS,
    STEPS,
    compare,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}


def way(name, word="exact", **columns):
    return pytest.mark.way(f"{name} (TRL)", **{"loss": word, **columns})


def pairs_of(folder, name, rows=None, model=None, options=None, evaluated=False, **changes):
    """Two trainers alike: one for plain logits, one for ours."""
    for _ in range(2):
        trainer = trainer_of(
            folder,
            name,
            rows=rows,
            model=None if model is None else model(folder),
            options={
                **(
                    {"eval_dataset": datasets.Dataset.from_list(MEMBERS[name][0][:4])}
                    if evaluated
                    else {}
                ),
                **({} if options is None else options(folder)),
            },
            **{**(EVALUATED if evaluated else {}), **changes},
        )
        yield trainer


# passes of the policy and of references in three steps
FUSED = {"SFT": 3, "DPO": 6, "KTO": 12, "GRPO": 6, "RLOO": 9}


@pytest.mark.parametrize("name", [pytest.param(name, marks=way(name)) for name in FUSED])
def test_losses_and_metrics_of_training_and_evaluation(tmp_path, name):
    evaluated = name in ("SFT", "DPO", "KTO")
    callback, curve = compare(*pairs_of(tmp_path, name, evaluated=evaluated))
    assert callback.report.fused == FUSED[name] and not callback.report.skipped
    assert not callback.report.materialised and not callback.evaluation.materialised
    assert bool(callback.evaluation.fused) == evaluated
    assert sum("loss" in entry for entry in curve) == STEPS
    assert any(abs(entry["grad_norm"]) > 1e-2 for entry in curve if "loss" in entry)
