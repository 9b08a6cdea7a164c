"""Trainers in threads, a training inside another one, kernels before a fork: each trains what it
trains alone."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from support.plugged import curves, examples, trainer_of
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

import fastft

WAYS = {"padding left out": {"packing": "collate"}, "overlapped": {"offload": "overlap"}}


def plugged(folder, way, **changes):
    # Trainers in threads draw from one generator
    trainer = trainer_of(folder, train_sampling_strategy="sequential", max_steps=3, **changes)
    if way == "overlapped":
        trainer.model.to(torch.bfloat16)
    fastft.plug(trainer, **WAYS[way])
    return trainer


def found(trainer):
    return curves(trainer)[:2], {name: p.clone() for name, p in trainer.model.named_parameters()}


def same(one, other):
    return one[0] == other[0] and all(torch.equal(p, other[1][name]) for name, p in one[1].items())


@pytest.mark.parametrize("way", WAYS)
def test_two_trainers_in_two_threads(tmp_path, way):
    expected = [found(plugged(tmp_path, way, learning_rate=rate)) for rate in (1e-2, 3e-3)]
    trainers = [plugged(tmp_path, way, learning_rate=rate) for rate in (1e-2, 3e-3)]
    got = [None, None]

    def train(number):
        got[number] = found(trainers[number])

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(same, got, expected))


class _TrainsToo(TrainerCallback):
    def __init__(self, other):
        self.other, self.found = other, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.found = found(self.other)


@pytest.mark.parametrize(
    "way", ["padding left out", pytest.param("overlapped", marks=pytest.mark.slow)]
)
def test_a_training_of_another_model_inside_a_training(tmp_path, way):
    expected = [found(plugged(tmp_path, way, learning_rate=rate)) for rate in (1e-2, 3e-3)]
    inner = _TrainsToo(plugged(tmp_path, way, learning_rate=3e-3))
    outer = plugged(tmp_path, way, learning_rate=1e-2)
    outer.add_callback(inner)
    assert same(found(outer), expected[0]) and same(inner.found, expected[1])


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(examples())


def batches(packs, method):
    loader = DataLoader(
        packs,
        batch_size=1,
        collate_fn=fastft.PackingCollator(),
        num_workers=0 if method is None else 1,
        multiprocessing_context=method,
    )
    return [dict(batch) for batch in loader]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[pytest.mark.slow] * (method != "fork"))
        for method in multiprocessing.get_all_start_methods()
    ],
)
@pytest.mark.parametrize("rows", [examples, _Stream], ids=["list", "stream"])
def test_workers_that_start_when_kernels_have_run_give_the_same_batches(tmp_path, rows, method):
    plugged(tmp_path, "padding left out").train()
    expected = batches(fastft.pack(rows(), 24), None)
    got = batches(fastft.pack(rows(), 24), method)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
