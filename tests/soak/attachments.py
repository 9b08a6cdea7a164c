"""`plug` and `restore`, callbacks on a model and off it, the fused loss as a context: all on one
Trainer, which trains nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import transformers
from support.plugged import examples, llama, tokenizer
from support.soaking import Watch
from support.trainers import quiet_arguments
from transformers import Trainer

import fastft

TURNS, EVERY = 1000, 25
BRIEF = 24, 2
BOUNDS: dict[str, float] = {}


def soak(watch: Watch, turns: int, every: int, folder: Path, each: Callable[[], None]) -> None:
    model = llama(attn_implementation="fastft")
    args = quiet_arguments(folder, max_steps=2, per_device_train_batch_size=4)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    trainer = Trainer(model, args, train_dataset=examples(), data_collator=collator)
    for turn in range(1, turns + 1):
        fastft.plug(trainer, packing="collate", moments="8bit").restore()
        for kind in (fastft.FusedLossCallback, fastft.PackingCallback, fastft.ThroughputCallback):
            callback = kind()
            trainer.add_callback(callback)
            callback.on_train_begin(args, trainer.state, trainer.control, model=model)
            callback.restore()
            trainer.remove_callback(callback)
        with fastft.fused_loss(model):
            pass
        each()
        if turn % every == 0:
            watch.look(turn)
