"""States and gradients on the host under FSDP2 (and states under DDP), two processes on gloo: the
bits of one process with everything resident.

Each rank sees the same batch, so that the mean of the gradients over the ranks is exact."""

from __future__ import annotations

import functools
import itertools
from random import Random

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.offloaded import same
from support.scheduler import Scheduler
from torch.distributed.fsdp import fully_shard

import fastft
from fastft.optim.offload import pieces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]
MODES = {
    "fp32": (torch.float32, {}),
    "exact": (torch.bfloat16, {}),
    "exact 8bit": (torch.bfloat16, {"moments": "8bit"}),
    "exact 4bit": (torch.bfloat16, {"moments": "4bit"}),
    "stochastic bf16": (torch.bfloat16, {"rounding": "stochastic", "moments": "bf16"}),
}
STEPS, PROCESSES = 5, 2


def build(mode):
    """Odd sizes: no number of rows is a multiple of two ranks."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 7), torch.nn.Linear(7, 33), torch.nn.Linear(33, 1)]
    return torch.nn.Sequential(*layers).to(MODES[mode][0])


def optimizer_of(model, mode, offload):
    options = {"seed": 5, "max_grad_norm": 0.3, **MODES[mode][1]}
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, offload=offload, **options)
    if offload == "overlap":
        optimizer.follow(model)
    return optimizer


def train(model, optimizer, accumulation):
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(STEPS):
        for half in range(accumulation):
            generator = torch.Generator().manual_seed(10 * step + half)
            inputs = torch.randn(4, 5, generator=generator).to(dtype)
            loss = model(inputs).square().sum()
            loss.backward()
            losses.append(float(loss))
        optimizer.step()
        losses.append(float(optimizer.grad_norm))
        optimizer.zero_grad()
    return losses


def whole(tensor):
    if tensor.dtype == torch.int16:  # which gloo does not send
        tensor = tensor.to(torch.int32)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def snapshot(model, optimizer):
    """All weights and states, unsharded, in the model's order."""
    states = optimizer.state_dict()["state"]
    found = [whole(param.detach()).clone() for param in model.parameters()]
    for place in sorted(states):
        found += [whole(entry).clone() for entry in states[place].values()]
    return found


def check(how, offload, mode, accumulation, order):
    alone = build(mode)
    plain = optimizer_of(alone, mode, None)
    losses, expected = train(alone, plain, accumulation), snapshot(alone, plain)
    pieces.BUFFER = 4096
    with Scheduler(order, watched=False).installed():
        model = build(mode)
        if how == "DDP":
            model = torch.nn.parallel.DistributedDataParallel(model)
        else:
            for layer in model:
                fully_shard(layer)
            fully_shard(model)
        optimizer = optimizer_of(model, mode, offload)
        assert train(model, optimizer, accumulation) == losses
        found = snapshot(model, optimizer)
    assert len(found) == len(expected)
    different = [i for i, pair in enumerate(zip(found, expected, strict=True)) if not same(*pair)]
    assert not different, different


def _cases():
    ways = [("FSDP2", tier) for tier in ("states", "gradients", "overlap")] + [("DDP", "states")]
    random = Random(0)
    for (how, tier), mode in itertools.product(ways, MODES):
        accumulation, order = random.choice((1, 4)), random.choice(("late", "early", 1))
        name = f"{how}, {tier}, {mode}, accumulation {accumulation}, {order}"
        yield name, functools.partial(check, how, tier, mode, accumulation, order)


CASES = dict(_cases())


def _marked(case):
    how, tier, _ = case.split(", ", 2)
    row = {"states": f"{how}, states on the host", "gradients": f"{how}, gradients on the host"}
    marks = [pytest.mark.way(row[tier], optimizer="exact")] if tier in row else []
    return pytest.param(case, marks=marks)


@pytest.mark.parametrize("case", [_marked(case) for case in CASES])
def test_two_processes_have_the_bits_of_one(case, tmp_path_factory):
    assert processes.run(__name__, PROCESSES, tmp_path_factory)[case] == [""] * PROCESSES
