"""A Trainer for `hyperparameter_search`, in the processes of Ray too: each trial writes down what
its optimizer has, beside what was asked."""

from __future__ import annotations

import json

import pytest
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback

import fastft
from support.plugged import examples, llama, tokenizer
from support.trainers import quiet_arguments

RATES = (1e-3, 3e-2)
WAYS = ("stock", "adamw_spec", "plug")


class Note(TrainerCallback):
    """Writes down what trains, once a trial."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        group = inner.param_groups[0]
        used = [inner.defaults["lr"], group["betas"][0], group["weight_decay"]]
        asked = [args.learning_rate, args.adam_beta1, args.weight_decay]
        kind = type(inner).__module__.partition(".")[0]
        (self.folder / f"{args.learning_rate}.json").write_text(json.dumps([kind, used, asked]))

    def found(self):
        return [json.loads(file.read_text()) for file in self.folder.iterdir()]


def searching(folder, way):
    """A Trainer that makes a model for each trial: stock, with adamw_spec, or plugged; its Note."""
    steps = {"max_steps": 3, "per_device_train_batch_size": 4}
    args = quiet_arguments(folder, **steps, eval_strategy="steps", eval_steps=3)
    by_hand = {
        "optimizer_cls_and_kwargs": fastft.adamw_spec(args),
        "callbacks": [fastft.FusedLossCallback()],
    }
    trainer = Trainer(
        args=args,
        model_init=lambda trial=None: llama(),
        train_dataset=examples(),
        eval_dataset=examples(seed=2)[:6],
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        **(by_hand if way == "adamw_spec" else {}),
    )
    if way == "plug":
        fastft.plug(trainer)
    note = Note(folder / "noted")
    trainer.add_callback(note)
    return trainer, note


def check_search(search, folder):
    """Runs `search(trainer, folder)` each way; asserts that every trial trained at its own values
    and that fastft's best one is stock's, with its objective."""
    best = {}
    for way in WAYS:
        (folder / way).mkdir()
        trainer, note = searching(folder / way, way)
        best[way] = search(trainer, folder / way)
        found = note.found()
        assert len(found) == len({rate for _, (rate, *_), _ in found}) == len(RATES)
        for kind, used, asked in found:
            assert kind == ("torch" if way == "stock" else "fastft") and used == asked
    for way in WAYS[1:]:
        assert best[way].objective == pytest.approx(best["stock"].objective, rel=1e-6)
        assert best[way].hyperparameters == best["stock"].hyperparameters
