"""Bytes on the device, and on the host, as the tests' device counts them during whole trainings."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from support.scheduler import Scheduler

import fastft
from fastft.optim.offload import gradients, pieces, tiers

LAYERS, WIDTH = 12, 128
OF_LAYER = WIDTH * WIDTH * 2


@pytest.fixture(autouse=True)
def little_staging(monkeypatch):
    monkeypatch.setattr(pieces, "BUFFER", 8192)
    monkeypatch.setattr(gradients, "IN_FLIGHT", OF_LAYER)
    monkeypatch.setattr(gradients, "STAGE", 2048)


def _training(device, offload, *, accumulation, moments="fp32"):
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    model = model.to(torch.bfloat16)
    options = {"moments": moments, "max_grad_norm": 1.0, "seed": 0}
    optimizer = fastft.AdamW(model.parameters(), offload=offload, **options)
    if offload == "overlap":
        optimizer.follow(model)
    device.count(model.parameters())
    for _ in range(3):
        for _ in range(accumulation):
            model(torch.randn(3, WIDTH, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.state_dict()
    return model, optimizer


BYTES = {"states": 4.1, "gradients": 2.1, "overlap": 2.1}
# each value of each choice; the other combinations are slow
QUICK = [("states", 1, "8bit"), ("gradients", 4, "fp32"), ("overlap", 4, "8bit")]


@pytest.mark.parametrize(
    ("offload", "accumulation", "moments"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK))
        for case in itertools.product(BYTES, (1, 4), ("fp32", "8bit"))
    ],
)
def test_bytes_of_a_bf16_parameter_on_the_device(offload, accumulation, moments):
    with Scheduler().installed() as device:
        model, optimizer = _training(device, offload, accumulation=accumulation, moments=moments)
        count = sum(param.numel() for param in model.parameters())
        assert device.device_peak <= BYTES[offload] * count + 2 * OF_LAYER + 2 * 8192 + 2 * 2048 * 4
        predicted = tiers.bytes_of(optimizer.param_groups, "exact", offload)
        assert 0.98 * device.device_peak <= predicted.device <= device.device_peak + 2 * OF_LAYER
        assert predicted.host == pytest.approx(device.host_peak, rel=0.03)


@pytest.mark.parametrize("offload", ["states", "gradients", "overlap"])
def test_memory_of_the_host_is_bounded_and_given_back(offload):
    with Scheduler().installed() as device:
        peaks = []
        for _ in range(2):
            model, optimizer = _training(device, offload, accumulation=2)
            peaks.append(device.host_peak)
            del model, optimizer
            gc.collect()
            device.count()
            assert device.host_bytes == 0
        assert peaks[0] == peaks[1]
