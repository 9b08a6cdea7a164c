"""A worker of the DataLoader that dies: the training ends with an error that says so, and goes on
from its checkpoint to the bits of one in which none has died."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from support.plugged import examples, trainer_of
from support.trainers import logged
from torch.utils.data import IterableDataset, get_worker_info

import fastft

STEPS, SAVED = 6, 2


def _exhaust():
    raise MemoryError("no more")


DEATHS = {
    "killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        RuntimeError,
        "worker .*(kill|exited)",
    ),
    "exited": (lambda: os._exit(3), RuntimeError, "exited unexpectedly"),
    "out of memory": (_exhaust, MemoryError, "no more"),
}


class Rows(list):
    """Examples, one of which ends the worker that reads it."""

    dies = staticmethod(lambda: None)

    def __getitem__(self, index):
        if index == 9 and get_worker_info() is not None:
            self.dies()
        return super().__getitem__(index)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


def training(folder, kind, dies=lambda: None):
    rows = Rows(examples())
    rows.dies = dies
    arguments = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    if kind == "stream":
        rows = fastft.pack(Stream(rows), 24, open_packs=2)
        arguments["accelerator_config"] = {"dispatch_batches": False}
    trainer = trainer_of(
        folder,
        options={"train_dataset": rows, "data_collator": fastft.PackingCollator()}
        if kind == "stream"
        else {"train_dataset": rows},
        max_steps=STEPS,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=SAVED,
        train_sampling_strategy="sequential",
        **arguments,
    )
    fastft.plug(trainer, **({} if kind == "stream" else {"packing": 24}))
    return trainer


@pytest.mark.parametrize(
    ("kind", "death"),
    [
        pytest.param(kind, death, marks=[pytest.mark.slow] * ((kind, death) != ("list", "killed")))
        for kind in ("list", "stream")
        for death in DEATHS
    ],
)
def test_the_training_says_so_and_goes_on(tmp_path, kind, death):
    dies, error, message = DEATHS[death]
    whole = training(tmp_path / "whole", kind)
    whole.train()
    with pytest.raises(error, match=message):
        training(tmp_path / "dies", kind, dies).train()
    again = training(tmp_path / "dies", kind)
    saved = sorted(path.name for path in (tmp_path / "dies").glob("checkpoint-*"))
    again.train(resume_from_checkpoint=bool(saved))
    assert logged(again, "loss", "grad_norm") == logged(whole, "loss", "grad_norm")
    assert len(logged(whole)) == STEPS
    for name, param in again.model.named_parameters():
        assert torch.equal(param, whole.model.get_parameter(name)), name
