"""An exception in forward or backward loses no state: who goes on behind it has the resident
optimizer's bits."""

from __future__ import annotations

import pytest
import torch
from support.offloaded import TIERS, Chain, same, small_buffers
from support.scheduler import Scheduler

import fastft


class Failing(torch.autograd.Function):
    """Fails in backward where it is told to."""

    @staticmethod
    def forward(ctx, hidden, where):
        ctx.where = where
        if where == "forward":
            raise MemoryError("out of memory in forward")
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.where == "backward":
            raise MemoryError("out of memory in backward")
        return grad, None


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    small_buffers(monkeypatch)


def _training(offload, where, thrown_away):
    torch.manual_seed(0)
    model = Chain().to(torch.bfloat16)
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5, offload=offload)
    if offload == "overlap":
        optimizer.follow(model)
    fails = None
    middle = model.layers[1]
    middle.register_forward_hook(lambda module, args, output: Failing.apply(output, fails))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(5):
        for half in range(2):
            batch = torch.randint(0, 61, (2, 7), generator=generator)
            fails = where if (step, half) == (2, 1) else None
            try:
                loss = model(batch, batch).loss
                loss.backward()
                losses.append(loss.item())
            except MemoryError:
                losses.append(None)
                if thrown_away:
                    optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    states = optimizer.state_dict()["state"]
    tensors = [tensor.clone() for entries in states.values() for tensor in entries.values()]
    return losses, tensors + [weight.clone() for weight in model.state_dict().values()]


@pytest.mark.parametrize("thrown_away", [False, True], ids=["gone on with", "thrown away"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("offload", TIERS)
def test_an_exception_loses_no_state(offload, where, thrown_away):
    expected = _training(None, where, thrown_away)
    for order in ("late", "early", 1):
        with Scheduler(order).installed():
            found = _training(offload, where, thrown_away)
        assert found[0] == expected[0] and None in found[0]
        assert len(found[1]) == len(expected[1])
        assert all(map(same, found[1], expected[1]))
