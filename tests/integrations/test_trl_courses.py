"""TRL's trainers under plug: trained twice, resumed, interrupted and saved, beside a callback of
the user's, and by `python -m fastft run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fused_trainings import assert_stock
from support.trainers import logged
from transformers import LlamaForCausalLM, TrainerCallback

import fastft

trl = pytest.importorskip("trl", minversion="1.16")
from support.trl_trainers import (  # noqa: E402
    PAIRS,
    STEPS,
    policy,
    train,
    trainer_of,
    with_plain_heads,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL


def assert_alike(actual, expected):
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_trained_twice(tmp_path, name):
    stock, ours = (trainer_of(tmp_path, name) for _ in range(2))
    plug = fastft.plug(ours, optimizer=False)
    with_plain_heads(stock)
    before = vars(ours.model)["forward"]
    for _ in range(2):  # the second goes on with the weights of the first
        assert_alike(train(ours), train(stock))
        assert vars(ours.model)["forward"] is before
        assert plug.report.fused == {"SFT": STEPS, "DPO": 2 * STEPS}[name]


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_a_resumed_training_has_the_bits_of_one_that_went_through(tmp_path, name):
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "max_steps": 4}
    weights, found = [], []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = trainer_of(tmp_path, name, **saving)
        plug = fastft.plug(trainer)
        with torch.random.fork_rng():
            trainer.train(resume_from_checkpoint=resume)
        assert plug.lines["loss"] == "fused at lm_head"
        weights.append(weights_of(trainer.model))
        found.append(logged(trainer, "loss", "grad_norm"))
    assert found[0] == found[1]  # the log of the first two steps comes with the checkpoint
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


class Interrupts(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_interrupted_then_saved(tmp_path, name):
    stock, ours = (trainer_of(tmp_path, name) for _ in range(2))
    fastft.plug(ours, optimizer=False)
    for trainer in (with_plain_heads(stock), ours):
        trainer.add_callback(Interrupts())
        with pytest.raises(KeyboardInterrupt):
            train(trainer)
    assert type(vars(ours.model)["forward"]).__name__ == "method"  # TRL's own
    ours.save_model(str(tmp_path / "saved"))
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert_stock(saved)
    expected = weights_of(stock.model)
    assert saved.state_dict().keys() == expected.keys()
    for key, value in saved.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["plug", "the callback"])
def test_a_plugged_trainer_with_a_callback_of_the_user_s(tmp_path, first):
    stock, ours = (trainer_of(tmp_path, "DPO") for _ in range(2))
    expected = train(with_plain_heads(stock))
    callback = fastft.FusedLossCallback()
    if first == "the callback":
        ours.add_callback(callback)
    plug = fastft.plug(ours, optimizer=False)
    if first == "plug":
        ours.add_callback(callback)
    before = vars(ours.model)["forward"]
    assert_alike(train(ours), expected)
    assert callback.report.fused == plug.report.fused == 2 * STEPS
    assert plug.lines["loss"] == "fused at lm_head" and vars(ours.model)["forward"] is before


@pytest.mark.slow
def test_a_head_in_fp32_of_a_training_in_bf16(tmp_path):
    changes = {"bf16": True, "cast_lm_head_to_fp32": True, "max_steps": 2}
    stock, ours = (trainer_of(tmp_path, "GRPO", **changes) for _ in range(2))
    plug = fastft.plug(ours, optimizer=False)
    expected, actual = train(with_plain_heads(stock)), train(ours)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=5e-2, abs=5e-2)
    assert plug.report.fused == 4 and not plug.report.materialised


SCRIPT = f"""
import json, sys
import datasets, trl
from support.plugged import tokenizer
from support.trainers import quiet_arguments
from transformers import LlamaForCausalLM

arguments = quiet_arguments(
    "out", trl.DPOConfig, max_steps=3, per_device_train_batch_size=4, learning_rate=0.05,
    optim="sgd", bf16=False, seed=7,
)
trainer = trl.DPOTrainer(
    model=LlamaForCausalLM.from_pretrained("policy"),
    args=arguments,
    train_dataset=datasets.Dataset.from_list({PAIRS!r}),
    processing_class=tokenizer(),
)
trainer.train()
with open(sys.argv[1], "w") as file:
    json.dump(trainer.state.log_history, file)
"""


@pytest.mark.slow
def test_a_dpo_script_is_run_unchanged(tmp_path):
    policy(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    tests, package = Path(__file__).parents[1], Path(__file__).parents[2]
    folders = os.pathsep.join([str(package), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": folders, "HF_HUB_OFFLINE": "1"}
    found = {}
    for name, options in (("stock", []), ("fast", ["-m", "fastft", "run"])):
        line = [sys.executable, *options, "script.py", f"{name}.json"]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        history = json.loads((tmp_path / f"{name}.json").read_text())
        found[name] = [entry for entry in history if "loss" in entry]
    assert "fastft: loss: fused at lm_head" in done.stderr
    for mine, theirs in zip(found["fast"], found["stock"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)
