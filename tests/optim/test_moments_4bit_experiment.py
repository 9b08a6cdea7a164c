"""The emulation of 4-bit moments by which docs/adamw.md's table was made
(benchmarks/moments_4bit.py): it rounds as the optimizer does, and finds what the page says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastft.optim.adamw import AdamW
from fastft.optim.moment_blocks import ENTRIES
from fastft.optim.moment_codes import dequantise

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from moments_4bit import (
    Code,
    Kept,
    Rounded,
    eight_bits,
    even,
    power,
    power_v,
    stream_rounder,
)
from moments_8bit import simulate

CODES = {
    "m": even(32),
    "m ^3": Code(power(3), 64),
    "v": Code(power_v(3), 128),
    "8": eight_bits()[1],
}


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("columns", [1, 63, 507])
def test_a_value_becomes_a_neighbour_and_is_right_in_the_mean(name, columns):
    code, draws = CODES[name], 4096
    value = torch.randn(2, columns, generator=torch.Generator().manual_seed(0)).abs()
    value[1] = 0.0
    bits = torch.arange(draws, dtype=torch.int32).view(-1, 1) * (65536 // draws)
    for row in value:
        kept = code.rounded(row.expand(draws, -1), bits.expand(-1, columns))
        blocks = row.split(code.block)
        scale = torch.cat([block.amax().expand_as(block) for block in blocks])
        lowest = code.levels[0].clamp(min=0.0) * scale  # no code is below it
        assert all(len(column.unique()) <= 2 for column in kept.T[:70])
        torch.testing.assert_close(kept.mean(0), torch.maximum(row, lowest), atol=2e-3, rtol=0)


def test_a_quicker_place_is_the_one_looked_up():
    value = torch.rand(5, 300, generator=torch.Generator().manual_seed(1)) ** 6
    bits = torch.randint(65536, (5, 300), dtype=torch.int32)
    for code in (CODES["m"], CODES["8"]):
        looked_up = code._replace(place=None)
        assert torch.equal(code.rounded(value, bits), looked_up.rounded(value, bits))


def trained(make, steps):
    generator = torch.Generator().manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(130, 507, generator=generator))
    optimizer = make([weight])
    for _ in range(steps):
        weight.grad = torch.randn(130, 507, generator=generator)
        optimizer.step()
    return weight, optimizer


def test_unrounded_moments_train_as_those_of_fp32():
    weight, optimizer = trained(lambda params: Rounded(params, Kept(None, None), seed=3), 3)
    error, largest = optimizer.against_fp32()
    assert torch.equal(weight, trained(AdamW, 3)[0])
    assert error < 1e-3 and abs(largest - 1) < 1e-3  # told by weights, which are rounded


def test_only_groups_that_ask_for_fp32_keep_it():
    def make(params):
        spared.append(torch.nn.Parameter(params[0].detach().clone()))
        spared[0].grad = torch.ones_like(spared[0])
        groups = [{"params": params}, {"params": spared, "moments": "fp32"}]
        return Rounded(groups, Kept(CODES["m"], None), seed=3)

    spared = []
    weight, optimizer = trained(make, 1)
    blocks = optimizer.state[weight]["exp_avg"][0].split(32)
    assert all(len((block / block.abs().max()).unique()) <= 15 for block in blocks)
    torch.testing.assert_close(optimizer.state[spared[0]]["exp_avg"], 0.1 * spared[0].grad)


def test_first_moments_of_8_bits_are_those_of_the_optimizer():
    # its random bits and its blocks, also where rows are rounded in several pieces; of positive
    # values, because the optimizer rounds magnitudes
    weight, emulated = trained(lambda params: Rounded(params, Kept(*eight_bits()), seed=3), 1)
    own, optimizer = trained(lambda params: AdamW(params, moments="8bit", seed=3), 1)
    m, _ = dequantise(*(optimizer.state[own][entry] for entry in ENTRIES))
    positive = weight.grad > 0
    torch.testing.assert_close(
        emulated.state[weight]["exp_avg"][positive], m[positive], rtol=1e-5, atol=1e-12
    )


def test_beside_outliers_only_a_code_of_m_over_the_root_of_v_keeps_updates_small():
    v8 = eight_bits()[1]
    largest = {
        over_root: simulate("outlier", 100, stream_rounder(Kept(CODES["m"], v8, over_root)))[1]
        for over_root in (False, True)
    }
    assert largest[False] > 10
    assert largest[True] < 2
