"""Optimizers that come and go, one whose plan is made anew at each step, operators that raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.soaking import Watch
from torch import nn

import fastft

TURNS, EVERY = 3000, 75
BRIEF = 60, 4
BOUNDS: dict[str, float] = {}
RAISING = 10  # of each kind, a turn


def soak(watch: Watch, turns: int, every: int, folder: Path, each: Callable[[], None]) -> None:
    model = nn.Sequential(nn.Linear(130, 40), nn.Linear(40, 3)).bfloat16()
    replanned = fastft.AdamW(model.parameters(), moments="4bit")
    for turn in range(1, turns + 1):
        _step(fastft.AdamW(model.parameters(), moments="8bit", max_grad_norm=1.0), model)
        # who has a gradient is another each time
        model[turn % 2].bias.requires_grad_(turn % 4 < 2)
        _step(replanned, model)
        for _ in range(RAISING):
            _raise()
        each()
        if turn % every == 0:
            watch.look(turn)


def _step(optimizer: fastft.AdamW, model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def _raise() -> None:
    with pytest.raises(ValueError):
        fastft.cross_entropy(torch.ones(3, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError):
        fastft.plan_packs([3, -1], 8)
    with pytest.raises(RuntimeError):
        torch.ops.fastft.weight_checksum_(torch.ones(1), torch.ones(3), 0)
