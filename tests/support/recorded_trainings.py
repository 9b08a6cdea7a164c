"""Trainings of a tiny Llama that are recorded in this process: stock, the references, and with
fastft, whole or broken."""

import random

import torch
from transformers import Trainer

import fastft
from fastft.commands.trace import Trace
from fastft.integrations.recorder.recorder import Recorder, record
from fastft.integrations.reference_runs import add_noise, train_in_fp32
from support.trainers import quiet_arguments, tiny_llama

VOCABULARY = 97


def texts(count=22):
    """Documents of 3 to 19 tokens; of some the first labels are ignored."""
    drawn = random.Random(7)
    lengths = [drawn.randint(3, 19) for _ in range(count)]
    rows = [[drawn.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
    return [
        {"input_ids": ids, "labels": [-100] * (i % 3) + ids[i % 3 :]} for i, ids in enumerate(rows)
    ]


def padded(features):
    """What a padding collator of transformers makes."""
    width = max(len(feature["input_ids"]) for feature in features)
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([f[key] + [value] * (width - len(f[key])) for f in features])
        for key, value in fill.items()
    }
    lengths = torch.tensor([len(f["input_ids"]) for f in features])
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return batch


def trainer_of(
    folder, *, dtype=torch.float32, dropout=0.0, adapt=None, callbacks=(), eval_dataset=None, **more
):
    """A Trainer, always the same for the same settings.

    `adapt` makes another model of the Llama; `more` are arguments of the training.
    """
    model = tiny_llama(VOCABULARY, attention_dropout=dropout, num_hidden_layers=2).to(dtype)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "num_train_epochs": 3, "seed": 5}
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    arguments = quiet_arguments(folder, **{**batches, **settings, **more})
    return Trainer(
        model if adapt is None else adapt(model),
        arguments,
        train_dataset=texts(),
        eval_dataset=eval_dataset,
        data_collator=padded,
        callbacks=list(callbacks),
    )


def recorded(
    folder, variant="stock", *, steps=6, packing=None, options=None, defect=None, **settings
):
    """The trace of a training.

    Of the variant "fast" alone: `packing` and `options` go to `plug`, and `defect` gets the plugged
    Trainer.
    """
    trainer = trainer_of(folder, **settings)
    trace, plugged = Trace(variant), None
    if variant == "fast":
        plugged = fastft.plug(trainer, packing=packing, **(options or {}))
        if defect is not None:
            defect(trainer)
    elif variant == "noise":
        trace.noise = add_noise(trainer.model)
    elif variant == "fp32":
        train_in_fp32(trainer.model, trainer.accelerator)
    recorder = Recorder(trace, steps, lambda: None)
    recorder.plugged = plugged
    record(trainer, recorder)
    trainer.train()
    return trace
