"""A training that was killed in the middle of an epoch goes on from its last checkpoint to the bits
of one that was not."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from support.plugged import examples, llama
from support.trainers import logged, quiet_arguments
from transformers import Trainer, TrainerCallback

import fastft

STEPS, SAVED, KILLED = 6, 2, 5


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def training(folder, callbacks=()):
    """Packs in random order, bf16 weights that are rounded stochastically, bf16 moments."""
    torch.manual_seed(0)
    fastft.register_attention()
    saving = {"save_strategy": "steps", "save_steps": SAVED, "gradient_accumulation_steps": 2}
    args = quiet_arguments(
        folder, max_steps=STEPS, per_device_train_batch_size=1, learning_rate=1e-2, seed=3, **saving
    )
    model = llama(attn_implementation="fastft").to(torch.bfloat16)
    return Trainer(
        model,
        args,
        train_dataset=fastft.pack(examples(), max_tokens=32),
        data_collator=fastft.PackingCollator(),
        optimizers=fastft.adamw(model, args, rounding="stochastic", moments="bf16", seed=5),
        callbacks=[fastft.FusedLossCallback(), *callbacks],
    )


def killed(_, folder):
    training(folder, [Kill()]).train()


@pytest.mark.slow
@pytest.mark.way("killed in the middle, resumed", loss="exact", optimizer="exact", packing="exact")
def test_a_killed_training_goes_on_to_the_bit(tmp_path):
    whole = training(tmp_path / "whole")
    whole.train()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.spawn(killed, (str(tmp_path / "killed"),))
    saved = {path.name for path in (tmp_path / "killed").iterdir()}
    assert saved == {"checkpoint-2", "checkpoint-4"}
    again = training(tmp_path / "killed")
    again.train(resume_from_checkpoint=True)
    assert logged(again) == logged(whole) and len(logged(whole)) == STEPS
    for name, param in again.model.named_parameters():
        assert torch.equal(param, whole.model.get_parameter(name)), name
