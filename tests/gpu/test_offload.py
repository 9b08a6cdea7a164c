"""What only a GPU can show of states and gradients on the host: the resident bits over real
streams, copies that nobody waits for, and the memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.offloaded import TIERS, Case, assert_same_bits, small_buffers, trained
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastft
from fastft.ops import OPERATORS
from fastft.optim.offload import pieces
from fastft.optim.offload.device import Accelerator
from fastft.optim.offload.tiers import bytes_of

pytestmark = pytest.mark.gpu
large = pytest.mark.xdist_group("large")  # one after the other, however many processes test

CARD = torch.device("cuda", 0)
LONG = 2**30  # cycles, half a second and more
CASES = [
    Case(family, tier, rounding, moments, clipping, accumulation, params, resumed=resumed)
    for tier in TIERS
    for family, rounding, moments, clipping, accumulation, params, resumed in (
        ("chain", "exact", "fp32", "call", 4, "late", "as before"),
        ("chain", "stochastic", "bf16", "option", 1, "all", "None"),
        ("llama", "exact", "8bit", "option", 4, "all", "as before"),
        ("t5", "fp32", "fp32", "none", 1, "frozen", "no"),
    )
]


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Attention whose backward pass adds in one order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beside", [False, True], ids=["default stream", "another stream"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tier_has_the_resident_bits(
    case: Case, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_buffers(monkeypatch)
    stream = torch.cuda.Stream() if beside else torch.cuda.current_stream()
    with repeatable(), torch.cuda.stream(stream):
        plain = case._replace(resumed="no")
        expected = trained(plain, offload=None, steps=6, device="cuda")
        again = trained(plain, offload=None, steps=6, device="cuda")
        assert_same_bits(again, expected)  # or the model itself is not repeatable
        found = trained(case, offload=case.offload, steps=6, device="cuda")
    assert_same_bits(found, expected)


def stack(layers: int, width: int) -> torch.nn.Sequential:
    torch.manual_seed(0)
    made = [torch.nn.Linear(width, width, bias=False) for _ in range(layers)]
    return torch.nn.Sequential(*made).to("cuda", torch.bfloat16)


def train(model: torch.nn.Module, optimizer: Any, steps: int, width: int) -> None:
    for _ in range(steps):
        model(torch.ones(3, width, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("impl", ["cuda", "triton", "eager"])
def test_each_engine_has_the_resident_bits(
    impl: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = None if impl == "eager" else OPERATORS["adamw_"].unavailable(impl, CARD)
    if impl == "triton" and reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(pieces, "BUFFER", 2**16)
    models = []
    for offload in (None, tier):
        model = stack(5, 507)
        optimizer = fastft.AdamW(
            model.parameters(), moments="8bit", offload=offload, impl=impl, seed=7
        )
        if offload == "overlap":
            optimizer.follow(model)
        train(model, optimizer, 4, 507)
        optimizer.flush()
        models.append(model)
    for mine, resident in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, resident)


def test_a_copy_from_and_to_page_locked_memory_waits_for_nothing() -> None:
    device = Accelerator(CARD)
    queue, host, there = device.queue(), device.host_memory(2**22), device.memory(2**22)
    assert device.reaches(host) and device.reaches(host[128:].view(torch.float32))
    host.fill_(7)
    queue.wait(device.current().record())
    queue.launch(lambda: torch.cuda._sleep(LONG), [], [])
    queue.copy(there, host)
    queue.copy(host, there)
    end: Any = queue.record()
    assert not end.query()
    end.synchronize()
    assert there.eq(7).all()


def test_memory_that_is_let_go_of_stays_for_the_copies_that_were_begun() -> None:
    device = Accelerator(CARD)
    queue, host, there = device.queue(), device.host_memory(2**22), device.memory(2**22)
    host.fill_(7)
    queue.wait(device.current().record())
    queue.launch(lambda: torch.cuda._sleep(LONG), [], [])
    queue.copy(there, host)
    end: Any = queue.record()
    del host
    assert end.query() and there.eq(7).all()


@large
@pytest.mark.parametrize("tier", TIERS)
def test_the_device_holds_the_bytes_that_are_said(tier: str) -> None:
    layers, width = 24, 2048
    model = stack(layers, width)
    optimizer = fastft.AdamW(model.parameters(), offload=tier)
    if tier == "overlap":
        optimizer.follow(model)
    train(model, optimizer, 1, width)
    optimizer.flush()
    gc.collect()
    torch.cuda.synchronize()
    params = list(model.parameters())
    groups = [{"params": params, "moments": "fp32", "amsgrad": False}]
    said = bytes_of(groups, "exact", tier)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(model, optimizer, 2, width)
    optimizer.flush()
    beside = before - sum(param.nbytes for param in params) - said.staging
    activations = (layers + 2) * 3 * width * 2 + 2 * params[0].nbytes
    assert torch.cuda.max_memory_allocated() <= said.device + max(beside, 0) + activations
    states = [entry for state in optimizer.state.values() for entry in state.values()]
    kept = [entry for entry in states if entry.numel() > 1]
    assert kept and all(entry.device.type == "cpu" and entry.is_pinned() for entry in kept)
