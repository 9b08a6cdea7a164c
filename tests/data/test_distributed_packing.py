"""Packs on two processes (gloo): both take equally many steps, and every example is trained on
once, by one of them.

All cases run in one pair of processes, because starting it costs more than the cases.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter

import numpy as np
import pytest
import torch.distributed as dist
from support import processes
from support.trainers import quiet_arguments
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fastft.data.collator import PackingCollator
from fastft.data.packed import pack

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

PROCESSES, DATASETS, MAX_TOKENS, V = 2, 50, 48, 64


class Model(nn.Module):
    """Looks at one token at a time, and counts the batches and the labels that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(V, V)
        self.batches = self.supervised = 0

    def forward(self, input_ids, labels, num_items_in_batch=None, **kwargs):
        self.batches += 1
        self.supervised += int((labels != -100).sum())
        logits = self.logits(input_ids)[:, :-1].reshape(-1, V)
        return {
            "loss": nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
        }


class Recorder(PackingCollator):
    """Keeps the number and the length of each example that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __call__(self, features):
        features = list(features)
        for feature in features:
            self.seen += [
                (int(example["id"]), len(example["input_ids"])) for example in feature.examples
            ]
        return super().__call__(features)


class Stream(IterableDataset):
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def examples(lengths: np.ndarray) -> list[dict]:
    return [
        {"input_ids": [i % V] * n, "labels": [i % V] * n, "id": i}
        for i, n in enumerate(lengths.tolist())
    ]


def loop(packed, batch_size: int) -> tuple[Model, Recorder, int]:
    """As `train`, but with accelerate's loader alone, which costs a fraction of a Trainer."""
    model, collator = Model(), Recorder()
    loader = DataLoader(packed, batch_size=batch_size, collate_fn=collator)
    ranks = {"num_processes": PROCESSES, "process_index": dist.get_rank()}
    for batch in accelerate.data_loader.prepare_data_loader(loader, **ranks):
        loss = model(**batch)["loss"].detach()
        dist.all_reduce(loss)  # what would hang if the other rank had no batch
    return model, collator, model.batches


def train(packed, **options) -> tuple[Model, Recorder, int]:
    """The model, the collator and the steps of a Trainer's run on this process."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(PROCESSES)}
    # accelerate asks for them; the group is there
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with tempfile.TemporaryDirectory() as folder:
        # the recorder reads the examples' numbers
        quiet = {"logging_strategy": "no", "remove_unused_columns": False}
        args = quiet_arguments(folder, **quiet, train_sampling_strategy="sequential", **options)
        model, collator = Model(), Recorder()
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=packed, data_collator=collator
        )
        trainer.train()
    return model, collator, trainer.state.global_step


def gathered(value) -> list:
    values = [None] * PROCESSES
    dist.all_gather_object(values, value)
    return values


def random_datasets():
    for seed in range(DATASETS):
        draw = np.random.default_rng(seed)
        longest = int(draw.choice([8, MAX_TOKENS]))
        lengths = draw.integers(1, longest + 1, int(draw.integers(1, 40)))
        if seed % 5 == 0:  # one example per pack: there is nothing to share out
            lengths = lengths // 2 + MAX_TOKENS // 2
        batch, accumulation = int(draw.integers(1, 4)), int(draw.integers(1, 3))
        window = [None, 7][seed % 2]
        packed = pack(
            examples(lengths), MAX_TOKENS, balance=PROCESSES * batch, seed=seed, window=window
        )
        if seed % 7 == 0:
            options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
            model, collator, steps = train(packed, per_device_train_batch_size=batch, **options)
        else:
            model, collator, steps = loop(packed, batch)
        assert len(set(gathered((steps, model.batches)))) == 1, f"dataset {seed}: ranks differ"
        assert model.batches == len(packed) / batch / PROCESSES
        seen = Counter(item for items in gathered(collator.seen) for item in items)
        expected = Counter(enumerate(lengths.tolist()))
        empty = int((packed.plan.offsets.diff() == 0).sum())
        assert not expected - seen, f"dataset {seed}: lost {expected - seen}"
        more = seen - expected
        assert more.total() == empty and all(length == 1 for _, length in more), (
            f"dataset {seed}: doubled {more}"
        )
        assert sum(gathered(model.supervised)) == (lengths - 1).sum()


def streams():
    rows = examples(np.random.default_rng(0).integers(1, MAX_TOKENS, 61))
    options = {"per_device_train_batch_size": 1, "accelerator_config": {"dispatch_batches": False}}
    packs = len(list(pack(Stream(rows), MAX_TOKENS)))
    steps = -(-packs // PROCESSES)
    model, collator, made = train(pack(Stream(rows), MAX_TOKENS), max_steps=steps, **options)
    assert made == model.batches == steps
    seen = Counter(item[0] for items in gathered(collator.seen) for item in items)
    assert seen.keys() == set(range(len(rows)))
    # accelerate fills the last step with packs of the first, where there are not enough
    first = next(iter(pack(Stream(rows), MAX_TOKENS))).examples if packs % PROCESSES else []
    assert {i for i, count in seen.items() if count > 1} <= {example["id"] for example in first}


def dispatching_raises_on_both():
    with pytest.raises(ValueError, match="each rank has to load its own batches"):
        train(pack(Stream(examples(np.arange(1, 20))), MAX_TOKENS), max_steps=2)
    dist.barrier()


CASES = {case.__name__: case for case in (random_datasets, streams, dispatching_raises_on_both)}


@pytest.mark.parametrize("case", CASES)
def test_on_two_processes(case, tmp_path_factory):
    assert processes.run(__name__, PROCESSES, tmp_path_factory)[case] == [""] * PROCESSES
