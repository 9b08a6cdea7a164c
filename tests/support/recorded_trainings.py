"""Trainings of a tiny Llama that are recorded in this process, stock or with fastft's parts put on
by hand."""

import random

import torch
from transformers import Trainer

import fastft
from fastft.commands.trace import Trace
from fastft.integrations.recorder import Recorder, record
from support.trainers import quiet_arguments, tiny_llama

VOCABULARY = 97


def texts(count=24):
    """Documents of 3 to 19 tokens, a few of whose first labels are ignored."""
    drawn = random.Random(7)
    rows = [
        [drawn.randrange(3, VOCABULARY) for _ in range(drawn.randint(3, 19))] for _ in range(count)
    ]
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


def recorded(folder, *, steps=3, fused=False, packed=False, model=None, kind=Trainer, **changes):
    """The trace of a training, `fused` with our loss and optimizer, `packed` with our collator."""
    model = model or tiny_llama(VOCABULARY, attention_dropout=changes.pop("dropout", 0.0))
    arguments = quiet_arguments(
        folder, **{"per_device_train_batch_size": 4, "max_steps": 2 * steps, "seed": 5, **changes}
    )
    trainer = kind(
        model,
        arguments,
        train_dataset=texts(),
        data_collator=fastft.PackingCollator() if packed else padded,
        callbacks=[fastft.FusedLossCallback()] if fused else [],
        optimizer_cls_and_kwargs=fastft.adamw_spec(arguments) if fused else None,
    )
    if fused:
        fastft.fuse_clipping(trainer)
    trace = Trace("fast" if fused else "stock")
    record(trainer, Recorder(trace, steps, lambda: None))
    trainer.train()
    return trace
