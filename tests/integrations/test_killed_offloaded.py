"""A training with states or gradients on the host that was killed goes on from its checkpoint, with
the same `offload` or another, to the bits of a resident one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from support.plugged import examples, llama, tokenizer
from support.trainers import logged, quiet_arguments
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

import fastft

STEPS, SAVED, KILLED = 6, 2, 5


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def training(folder, offload, callbacks=()):
    """Trainer's own clipping and accumulation, bf16 weights with their low bits."""
    torch.manual_seed(0)
    saving = {"save_strategy": "steps", "save_steps": SAVED, "gradient_accumulation_steps": 2}
    args = quiet_arguments(
        folder, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, seed=3, **saving
    )
    trainer = Trainer(
        llama().to(torch.bfloat16),
        args,
        train_dataset=examples(),
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        callbacks=list(callbacks),
    )
    fastft.plug(trainer, offload=offload, moments="8bit", seed=5)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = training(tmp_path_factory.mktemp("whole"), None)
    trainer.train()
    return trainer


def assert_same(trainer, whole):
    assert logged(trainer, "loss", "grad_norm") == logged(whole, "loss", "grad_norm")
    assert len(logged(whole)) == STEPS
    for name, param in trainer.model.named_parameters():
        assert torch.equal(param, whole.model.get_parameter(name)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("states", "states"),
        ("gradients", "gradients"),
        ("overlap", "overlap"),
        ("overlap", None),
        (None, "overlap"),
    ],
)
def test_a_killed_training_goes_on_to_the_bit(first, then, whole, tmp_path):
    training_there = f"tests.training({str(tmp_path)!r}, {first!r}, [tests.Kill()]).train()"
    code = f"import {__name__} as tests; {training_there}"
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    again = training(tmp_path, then)
    again.train(resume_from_checkpoint=True)
    assert_same(again, whole)


def test_checkpoints_of_each_tier_go_on_in_the_next(whole, tmp_path):
    tiers = ["states", "gradients", "overlap"]
    for first, then in zip(tiers, [*tiers[1:], "states"], strict=True):
        training(tmp_path / first, first).train()
        again = training(tmp_path / first, then)
        again.train(resume_from_checkpoint=str(tmp_path / first / f"checkpoint-{SAVED}"))
        assert_same(again, whole)
