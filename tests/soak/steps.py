"""Steps of one training with everything on: packs of equal cost in an order of each epoch, bf16
weights with 8-bit moments, clipping inside the step, the fused loss, evaluations, checkpoints of
which the older go, what a training logs of its speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from support.soaking import Watch
from support.trainers import quiet_arguments, tiny_llama
from transformers import Trainer, TrainerCallback

import fastft

TURNS, EVERY = 2000, 50
BRIEF = 24, 2
EVALUATED = 50, 12  # steps between evaluations, and saves; briefly, none among the later looks
# accelerate keeps the loader of each evaluation that Trainer makes, about ten objects
BOUNDS = {"objects": 0.2 + 12 / EVALUATED[0]}


class _Each(TrainerCallback):
    def __init__(self, watch: Watch, every: int, each: Callable[[], None]) -> None:
        self._watch, self._every, self._each = watch, every, each

    def on_step_begin(self, args, state, control, **kwargs):
        # a look is behind what an evaluation or a save of the step before has left
        if state.global_step and state.global_step % self._every == 0:
            self._watch.look(state.global_step)
        self._each()


def soak(watch: Watch, turns: int, every: int, folder: Path, each: Callable[[], None]) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (60,), generator=draw).tolist()
    rows = [
        {"input_ids": torch.randint(3, 97, (length,), generator=draw).tolist()}
        for length in lengths
    ]
    evaluated = EVALUATED[turns < TURNS]
    model = tiny_llama(attn_implementation="fastft").bfloat16()
    args = quiet_arguments(
        folder,
        max_steps=turns,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        max_grad_norm=0.5,
        logging_steps=every,
        eval_strategy="steps",
        eval_steps=evaluated,
        save_strategy="steps",
        save_steps=evaluated,
        save_total_limit=2,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=fastft.pack(rows, max_tokens=64, seed=3, balance=2),
        eval_dataset=fastft.pack(rows[:9], max_tokens=64),
        data_collator=fastft.PackingCollator(),
        optimizers=fastft.adamw(model, args, moments="8bit"),
        callbacks=[
            fastft.FusedLossCallback(),
            fastft.PackingCallback(),
            fastft.ThroughputCallback(peak_flops=1e12),
            _Each(watch, every, each),
        ],
    )
    fastft.fuse_clipping(trainer)
    trainer.train()
