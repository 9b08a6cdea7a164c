"""The bytes of each tier are those that an allocator counts which knows what is device."""

import pytest
import torch
from support.scheduler import Scheduler

import fastft
from fastft.optim.adamw import ROUNDINGS
from fastft.optim.moment_codes import CODES
from fastft.optim.offload import gradients, pieces, tiers

LAYERS, WIDTH = 5, 129
OF_LAYER = WIDTH * WIDTH * 2


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(pieces, "BUFFER", 9001)
    monkeypatch.setattr(gradients, "IN_FLIGHT", OF_LAYER)
    monkeypatch.setattr(gradients, "STAGE", 16384)


def trained(device, offload, micro_steps, dtype=torch.bfloat16, **options):
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers).to(dtype)
    optimizer = fastft.AdamW(model.parameters(), offload=offload, seed=0, **options)
    device.count(model.parameters())
    for _ in range(2):
        for _ in range(micro_steps):
            model(torch.randn(3, WIDTH, dtype=dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    device.finish()
    return optimizer


@pytest.mark.parametrize("moments", ["fp32", "bf16", *CODES])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_states_on_the_host_are_counted_to_the_byte(small_buffers, moments, rounding):
    with Scheduler().installed() as device:
        optimizer = trained(device, "states", 1, moments=moments, rounding=rounding)
        size = tiers.bytes_of(optimizer.param_groups, rounding, "states")
        assert (size.device, size.host) == (device.device_peak, device.host_peak)


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_on_the_host_leave_what_is_in_flight(small_buffers, micro_steps, dtype):
    with Scheduler().installed() as device:
        optimizer = trained(device, "gradients", micro_steps, dtype, max_grad_norm=1.0)
        groups = optimizer.param_groups
        size = tiers.bytes_of(groups, "exact", "gradients", micro_steps=micro_steps)
        assert size.host == device.host_peak
        most = size.device - device.device_peak
        assert 0 <= most <= OF_LAYER * dtype.itemsize


@pytest.mark.parametrize(
    ("moments", "amsgrad"),
    [
        ("fp32", False),
        ("fp32", True),
        ("bf16", False),
        ("bf16", True),
        *((moments, False) for moments in CODES),
    ],
)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_states_of_the_device_are_those_of_a_step(moments, rounding, amsgrad):
    shapes = (63,), (4097,), (5, 507), (), (3, 1, 130)
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
    options = {"moments": moments, "rounding": rounding, "amsgrad": amsgrad}
    optimizer = fastft.AdamW(params, **options)
    size = tiers.bytes_of(optimizer.param_groups, rounding, None)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    entries = [entry for state in optimizer.state.values() for entry in state.items()]
    assert size.states == sum(entry.nbytes for name, entry in entries if name != "step")
    assert size.weights == size.gradients == sum(param.nbytes for param in params)
    assert size.staging == size.host == 0


def test_released_gradients_are_one_at_a_time():
    params = [torch.zeros(shape, device="meta") for shape in ((7, 9), (128, 130))]
    groups = [{"params": params, "moments": "fp32", "amsgrad": False}]
    size = tiers.bytes_of(groups, "exact", None, release_gradients=True)
    assert size.gradients == params[1].nbytes and size.host == 0
    assert size.states == 8 * sum(param.numel() for param in params)


def test_nothing_is_allocated_to_know_it():
    params = [torch.empty(1 << 17, 1 << 17, dtype=torch.bfloat16, device="meta")]
    groups = [{"params": params, "moments": "8bit", "amsgrad": False}]
    none, states, held, overlap = (tiers.bytes_of(groups, "exact", tier) for tier in tiers.TIERS)
    assert none.device == states.device - states.staging + states.host
    assert held == overlap and held.host == states.host + params[0].nbytes
