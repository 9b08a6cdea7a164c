"""plug on two processes that average gradients (DDP over gloo): the losses of stock."""

from __future__ import annotations

import contextlib
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.plugged import STEPS, curves, trainer_of

import fastft

PROCESSES = 2
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]


@contextlib.contextmanager
def as_a_rank():
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(PROCESSES)}
    # accelerate asks for them; the group is there
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def same_losses(task, **plugs):
    given = {"eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 2}
    with as_a_rank() as folder:
        stock = curves(trainer_of(folder, task, **given))
        trainer = trainer_of(folder, task, **given)
        plug = fastft.plug(trainer, **plugs)
        ours = curves(trainer)
    assert trainer.args.world_size == PROCESSES and plug.report.fused == STEPS, plug.lines
    for expected, actual in zip(stock, ours, strict=True):
        assert len(expected) > 0 and actual == pytest.approx(expected, rel=2e-5)


def loss_and_optimizer():
    same_losses("causal")


def packed_batches():
    same_losses("causal", packing="collate")


def packed_batches_of_masked_texts():
    same_losses("masked", packing="collate")


def each_pack_is_on_one_rank():
    with as_a_rank() as folder:
        trainer = trainer_of(folder, max_steps=-1, num_train_epochs=1)
        fastft.plug(trainer, packing=40)
        tokens = []

        def note(module, args, kwargs):
            if torch.is_grad_enabled():
                tokens.append(kwargs["input_ids"].numel())

        trainer.model.register_forward_pre_hook(note, with_kwargs=True)
        trainer.train()
    sums = torch.tensor([sum(tokens), len(tokens)])
    dist.all_reduce(sums)
    # three packs, of which one comes twice so that both ranks have two
    assert trainer.state.global_step == 2 and int(sums[1]) == 4


CASES = {
    "loss and optimizer": loss_and_optimizer,
    "packed batches": packed_batches,
    "packed batches of masked texts": packed_batches_of_masked_texts,
    "each pack is on one rank": each_pack_is_on_one_rank,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.run(__name__, PROCESSES, tmp_path_factory)


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(name, outcomes):
    assert outcomes[name] == ["", ""]
