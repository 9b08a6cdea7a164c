"""A task of the collator is one class: what a new one has to bring."""

from __future__ import annotations

import torch
from support.packed_examples import make, unpacked

from fastft.data import collator
from fastft.data.tasks.task import Task


class CountedDown(Task):
    """Labels that no example has: how many tokens of it are left."""

    undivided = "task 'counted_down' counts whole examples"

    def take(self, columns):
        self.least = min(map(min, columns.pop("least"))) if "least" in columns else 0

    def fill(self, columns, layout):
        columns["labels"] = [[*range(len(ids) - 1, -1, -1)] for ids in columns["input_ids"]]
        return super().fill(columns, layout)

    def finish(self, batch, layout):
        batch["least"] = torch.tensor([self.least])


def test_a_sixth_task_is_one_class(monkeypatch):
    monkeypatch.setitem(collator.TASKS, "counted_down", CountedDown)
    examples = make([3, 1, 2, 4], least=5)
    for options in ({}, {"expand_on_device": True}):
        made = collator.PackingCollator(
            task="counted_down", rows=2, pad_to_multiple_of=4, **options
        )
        batch = made(examples).to("cpu")
        labels = sorted(label for label in unpacked(batch, "labels") if -100 not in label)
        assert labels == [[0], [1, 0], [2, 1, 0], [3, 2, 1, 0]]
        assert batch["padding_lengths"].sum() == batch["labels"].eq(-100).sum()
        assert batch["least"].tolist() == [5] and batch.counted == 10
    padded = collator.PackingCollator(task="counted_down", pad_examples=True)(examples)
    assert padded["labels"][1].tolist() == [0, -100, -100, -100] and "least" not in padded
