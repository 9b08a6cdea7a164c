"""The deferred step under FSDP2, two processes on gloo: whoever gathers or reads a shard finds it
updated."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.scheduler import Scheduler
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastft
from fastft.foreign import awaited
from fastft.optim.offload import deferred

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
    # two processes that import torch; test_two_processes.py has the tier among its own
    pytest.mark.slow,
]


def build(how: str) -> Any:
    """Layers of odd sizes; each is a unit but for those that `how` puts together."""
    torch.manual_seed(0)
    sizes = [(5, 7), (7, 9), (9, 9), (9, 3)]
    model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes)).bfloat16()
    if how == "resident":
        return model
    if how == "units of two layers":
        fully_shard([model[0], model[1]])
        fully_shard([model[2], model[3]])
    elif how != "one unit":
        for layer in model[: 3 if how == "a layer of the root" else None]:
            fully_shard(layer, reshard_after_forward=how != "not resharded")
    fully_shard(model)
    if how == "prefetched":
        for layer, following in itertools.pairwise(model):
            layer.set_modules_to_forward_prefetch([following])
    return model


def whole(weight: Any) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def train(model: Any, optimizer: Any, look: Any = None) -> list[torch.Tensor]:
    """The losses, and what `look` has seen after each step."""
    found = []
    for step in range(4):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = model(inputs).float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        waiting = {awaited.is_awaited(param) for param in model.parameters()}
        assert waiting == {optimizer.offload == "overlap"}
        found.append(loss.detach())
        if look is not None:
            found.append(whole(look(model)).detach().clone())
    return found + [whole(param).detach().clone() for param in model.parameters()]


def _unshard(model: Any) -> Any:
    if not hasattr(model, "unshard"):
        return model[1].weight
    model[1].unshard()
    weight = model[1].weight.detach().clone()
    model[1].reshard()
    return weight


LOOKS = {
    "a norm": lambda model: model[1].weight.norm(),
    "full_tensor": lambda model: whole(model[1].weight),
    "state_dict": lambda model: model.state_dict()["1.weight"],
    "unshard": _unshard,
    "get_model_state_dict": lambda model: get_model_state_dict(model)["1.weight"],
}


def check(how: str, look: Any, order: str) -> None:
    alone = build("resident")
    options = {"lr": 1e-2, "max_grad_norm": 0.3}
    expected = train(alone, fastft.AdamW(alone.parameters(), **options), look)
    deferred.AHEAD = 0
    on_host = contextlib.nullcontext()  # which has no queues, and takes checksums of weights
    with on_host if order == "host" else Scheduler(order, watched=False).installed():
        model = build(how)
        optimizer = fastft.AdamW(model.parameters(), offload="overlap", **options)
        optimizer.follow(model)
        found = train(model, optimizer, look)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


UNITS = ["a unit each", "units of two layers", "one unit", "a layer of the root", "not resharded"]
CASES = {
    f"{how}, {order}": functools.partial(check, how, None, order)
    for how in (*UNITS, "prefetched")
    for order in ("late", "early", "host")
} | {name: functools.partial(check, "a unit each", look, "late") for name, look in LOOKS.items()}


@pytest.mark.parametrize("case", CASES)
def test_whoever_gathers_or_reads_a_shard_finds_it_updated(case, tmp_path_factory):
    assert processes.run(__name__, 2, tmp_path_factory)[case] == ["", ""]
