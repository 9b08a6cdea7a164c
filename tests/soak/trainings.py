"""Trainings in one process, each of a new model and Trainer, plugged or with callbacks by turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import transformers
from support.plugged import examples, llama, tokenizer
from support.soaking import Watch
from support.trainers import quiet_arguments
from transformers import Trainer

import fastft

TURNS, EVERY = 200, 8
BRIEF = 12, 1
BOUNDS = {"allocated": 16384.0, "resident": 65536.0, "anonymous": 65536.0}  # a model has more


def soak(watch: Watch, turns: int, every: int, folder: Path, each: Callable[[], None]) -> None:
    for turn in range(1, turns + 1):
        _train(folder, plugged=turn % 2 == 0)
        each()
        if turn % every == 0:
            watch.look(turn)


def _train(folder: Path, plugged: bool) -> None:
    model = llama(attn_implementation="fastft")
    in_order = {"train_sampling_strategy": "sequential"}  # of the packs
    args = quiet_arguments(folder, max_steps=2, per_device_train_batch_size=4, **in_order)
    if plugged:
        collator = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)
        trainer = Trainer(model, args, train_dataset=examples(), data_collator=collator)
        pieces = fastft.plug(trainer, packing="collate", moments="8bit")
        trainer.train()
        pieces.restore()
        return
    trainer = Trainer(
        model,
        args,
        train_dataset=fastft.pack(examples(), max_tokens=32, seed=1),
        data_collator=fastft.PackingCollator(),
        optimizers=fastft.adamw(model, args, moments="4bit"),
        callbacks=[
            fastft.FusedLossCallback(),
            fastft.PackingCallback(),
            fastft.ThroughputCallback(peak_flops=1e12),
        ],
    )
    fastft.fuse_clipping(trainer)
    trainer.train()
