"""8-bit moments: every code, its neighbours and its mean."""

from __future__ import annotations

import pytest
import torch
from support.adamw_steps import needs_native
from torch.nn import Parameter

from fastft.optim import moment_codes
from fastft.optim.adamw import AdamW
from fastft.optim.moment_blocks import ENTRIES


def codes_of(m, v):
    state = moment_codes.entries_of(moment_codes.new_entries(m, "8bit"))
    moment_codes.quantise(m, v, state)
    return state


def test_every_code_stands_for_itself():
    # each in a block of its own, beside the largest
    codes = (
        torch.full((256, 2), 127, dtype=torch.int8),
        torch.full((256, 2), 255, dtype=torch.uint8),
    )
    codes[0][:, 1], codes[1][:, 1] = torch.arange(256).sub(127).clamp(max=127), torch.arange(256)
    m, v = moment_codes.dequantise(*codes, *torch.ones(2, 256, 1).unbind())
    assert torch.equal(m[:, 0], torch.ones(256)) and torch.equal(v[:, 0], torch.ones(256))
    assert (
        (m[:255, 1].diff() > 0).all()
        and m[127, 1] == 0
        and (v[:, 1].diff() > 0).all()
        and v.min() > 0
    )
    assert all(map(torch.equal, codes_of(m, v), (*codes, *torch.ones(2, 256, 1))))


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e30])
def test_rounding_is_right_in_the_mean(scale):
    value = torch.rand(1, 100, generator=torch.Generator().manual_seed(1)) ** 3 * scale
    bits = torch.arange(0, 65536, 64, dtype=torch.int32)
    many = value.expand(len(bits), 100).contiguous()
    state = tuple(
        torch.empty(shape, dtype=dtype)
        for shape, dtype in (
            (many.shape, torch.int8),
            (many.shape, torch.uint8),
            ((len(bits), 1), torch.float32),
            ((len(bits), 1), torch.float32),
        )
    )
    moment_codes.quantise(many, many, state, *[bits[:, None].expand_as(many)] * 2)
    m, v = moment_codes.dequantise(*state)
    assert torch.equal(state[2], many.amax(1, keepdim=True)) and torch.equal(state[2], state[3])
    large = value[0] > value.max() / 2e6  # smaller ones become the smallest value of v
    torch.testing.assert_close(m.double().mean(0), value[0].double(), rtol=2e-3, atol=1e-9 * scale)
    torch.testing.assert_close(
        v.double().mean(0)[large], value[0].double()[large], rtol=2e-3, atol=0.0
    )


@needs_native
@pytest.mark.parametrize("columns", [128, 127, 33])
def test_moments_beside_a_code_have_the_same_bits(columns):
    """First moments that are a code's value, or some last places beside it: where roots and floors
    may differ."""
    codes = torch.arange(128, dtype=torch.float64)
    values = (codes / 127).pow(4).float().roll(1)[:columns]  # the largest, 1, is in every row
    rows = torch.stack(
        [(values.view(torch.int32) + places).view(torch.float32) for places in range(-4, 5)]
    )
    grads = rows.clamp(0.0, 1.0).index_fill_(1, torch.tensor(0), 1.0)
    grads[::2] *= -1
    runs = []
    for impl in ("eager", "cpp"):
        param = Parameter(torch.zeros_like(grads))
        optimizer = AdamW([param], lr=1e-3, betas=(0.0, 0.999), moments="8bit", seed=7, impl=impl)
        entries = []
        for step in range(40):  # with betas[0] = 0 the first moment is the gradient
            param.grad = grads * 2.0**-step
            optimizer.step()
            entries += [optimizer.state[param][name].clone() for name in ENTRIES]
        runs.append(entries)
    for eager, cpp in zip(*runs, strict=True):
        assert torch.equal(eager, cpp)
