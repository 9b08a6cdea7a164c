"""4-bit moments: the codes and the step are what moments_4bit.py says, by numpy, block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.adamw_steps import ENGINES, gradients, start, train

from fastft.optim import moment_codes
from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import STREAMS, random_bits, swap_bytes
from fastft.optim.moment_blocks import BLOCK, ENTRIES

F32 = np.float32
MOST = np.finfo(F32).max
COLUMNS = (1, 63, 127, 129, 507, 4097)


def share(value, divisor):
    divisor = F32(1.0) if divisor == 0 else divisor
    up = F32(2.0**64) if divisor < F32(2.0**-100) else F32(1.0)
    return value * up * (F32(1.0) / (divisor * up))


def kept_v(v, scale, bits):
    """The codes of v, and what they stand for."""
    units = np.clip(share(v, scale) * F32(1.25 * 2**21), F32(1.0), F32(1.25 * 2**21))
    mantissa, exponent = np.frexp(units.astype(np.float64))  # in [1/2, 1)
    place = np.floor((2 * mantissa - 1) * 2**23).astype(np.int64) * 12 + bits * 128
    code = (exponent - 1) * 12 + place // 2**23
    value = ((12 + code % 12) * 2.0 ** (code // 12)).astype(F32)
    return code, value * F32(1 / (12 * 1.25 * 2**21)) * scale


def block_of(m, v, bits):
    """Codes, scales and kept values of one block: code of m, code of v, both scales, m, v."""
    good = np.isfinite(m) & np.isfinite(v)
    m, v = np.where(good, m, F32(0)), np.where(good, v, F32(0))
    scale_v = v.max()
    code_v, v = kept_v(v, scale_v, (bits & 255) << 8 | bits >> 8)
    root = np.sqrt(v)
    x = np.minimum(np.abs(m) / np.where(root == 0, F32(1), root), MOST)
    x = np.where(good & (root > 0), x, F32(0))
    scale_m = x.max()
    y = share(x, scale_m) * F32(7)
    low = np.minimum(y.astype(np.int64), 6)
    code = low + (bits < (y - low.astype(F32)) * F32(65536))
    code_m = np.where(good, np.where(m < 0, -code, code), -8)
    m = code_m.astype(F32) * F32(1 / 7) * (scale_m * root)
    return code_m, code_v, scale_m, scale_v, np.where(good, m, F32(np.nan)), v


@np.errstate(all="ignore")
def expected(m, v, bits):
    """The entries that moments of (rows, columns) become, and the moments that these keep."""
    rows, columns = m.shape
    code_m, code_v = np.zeros((rows, columns + columns % 2), np.int64), np.zeros(m.shape, np.int64)
    scales = [np.zeros((rows, -(-columns // BLOCK)), F32) for _ in range(2)]
    kept = np.empty_like(m), np.empty_like(v)
    for row in range(rows):
        for number, begin in enumerate(range(0, columns, BLOCK)):
            end = min(begin + BLOCK, columns)
            at = row, slice(begin, end)
            (code_m[at], code_v[at], scales[0][row, number], scales[1][row, number], *of_block) = (
                block_of(m[at], v[at], bits[at])
            )
            kept[0][at], kept[1][at] = of_block
    packed = (code_m[:, 0::2] % 16) | (code_m[:, 1::2] % 16) << 4
    return [packed.astype(np.uint8), code_v.astype(np.uint8), *scales], kept


def random_moments(rows, columns, seed=0):
    generator = np.random.default_rng(seed)
    m = generator.standard_normal((rows, columns)) * 10 ** generator.uniform(-4, 2, (rows, columns))
    v = m**2 * 10 ** generator.uniform(-2, 2, (rows, columns))
    return m.astype(F32), v.astype(F32)


def outliers(m, v):
    m[:, ::50], v[:, ::50] = 1e3, 1e6


def zeros(m, v):
    m[0], v[0], m[1], v[2], m[:, ::3] = 0, 0, 0, 0, -0.0


def spoilt(m, v):
    m[0, 0], v[1, -1], m[2], v[3, ::7] = np.inf, np.nan, -np.inf, np.inf


def tiny(m, v):
    m *= F32(1e-36)
    v *= F32(1e-40)  # denormal


def unfitting(m, v):
    """m / sqrt(v) overflows."""
    m[:], v[:] = 3e38, 1e-44
    m[:, ::2] = -1.0


def huge(m, v):
    m *= F32(1e18)
    v *= F32(1e29)


KINDS = {f.__name__: f for f in (outliers, zeros, spoilt, tiny, unfitting, huge, lambda m, v: None)}


def new_state(m):
    return moment_codes.entries_of(moment_codes.new_entries(m, "4bit"))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_contracts(columns, kind, poisoned_empty):
    m, v = random_moments(5, columns)
    KINDS[kind](m, v)
    bits = np.random.default_rng(1).integers(0, 65536, m.shape, np.int32)
    tensors = torch.from_numpy(m), torch.from_numpy(v)
    state, drawn = new_state(tensors[0]), torch.from_numpy(bits)
    moment_codes.quantise(*tensors, state, drawn, swap_bytes(drawn))
    wanted, kept = expected(m, v, bits)
    for name, entry, other in zip(ENTRIES, state, wanted, strict=True):
        assert np.array_equal(entry.numpy(), other, equal_nan=True), name
    for entry, other in zip(moment_codes.dequantise(*state), kept, strict=True):
        assert np.array_equal(entry.numpy(), other, equal_nan=True)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_step_is_the_contracts(columns, impl):
    """Moments of codes, an update of them, their new codes; and weights by the moments between."""
    (param,) = start([(3, columns)])
    optimizer = AdamW([param], lr=1e-2, weight_decay=0.0, moments="4bit", seed=11, impl=impl)
    steps = [grad.numpy() for (grad,) in gradients([(3, columns)], 4)]
    steps[2][0, 0], steps[3][1] = np.inf, 0.0
    kept = np.zeros((3, columns), F32), np.zeros((3, columns), F32)
    weight = param.detach().numpy().astype(np.float64)
    for number, grad in enumerate(steps, 1):
        train(optimizer, [[torch.from_numpy(grad)]])
        with np.errstate(all="ignore"):
            g, m, v = (x.astype(np.float64) for x in (grad, *kept))
            m = (F32(1 - 0.9) * (grad - kept[0]).astype(np.float64) + m).astype(F32)
            v = (
                (grad * F32(1 - 0.999)).astype(np.float64) * g
                + (kept[1] * F32(0.999)).astype(np.float64)
            ).astype(F32)
            root = np.sqrt(v.astype(np.float64)) / (1 - 0.999**number) ** 0.5
            weight -= 1e-2 / (1 - 0.9**number) * m / (root + 1e-8)
        bits = random_bits(0, grad.size, number, STREAMS["moments"], 11, param.device)
        wanted, kept = expected(m, v, bits.view(3, columns).numpy())
        for name, other in zip(ENTRIES, wanted, strict=True):
            entry = optimizer.state[param][name].numpy()
            assert np.array_equal(entry, other, equal_nan=True), (name, number)
    good = np.isfinite(weight)
    assert good.sum() == weight.size - 1
    np.testing.assert_allclose(param.detach().numpy()[good], weight[good], rtol=1e-5, atol=1e-6)


def test_every_code_stands_for_itself():
    # each in a block of its own, beside the largest
    codes = torch.arange(-8, 8).clamp(min=-7).to(torch.uint8) & 15
    state = 7 | codes[:, None] << 4, torch.full((16, 2), 255, dtype=torch.uint8)
    m, v = moment_codes.dequantise(*state, torch.ones(16, 1), torch.ones(16, 1))
    assert torch.equal(m[:, 0], torch.ones(16)) and torch.equal(v, torch.ones(16, 2))
    assert (m[1:, 1].diff() > 0).all() and m[8, 1] == 0
    again = new_state(m)
    moment_codes.quantise(m, v, again)
    assert all(map(torch.equal, again[:2], state))


@pytest.mark.parametrize("scale", [1e-15, 1e-7, 1.0, 1e15])
def test_rounding_is_right_in_the_mean(scale):
    m = torch.randn(1, 100, generator=torch.Generator().manual_seed(1)) * scale
    m[0, :2] = torch.tensor([3.0, 0.0]) * scale
    bits = torch.arange(0, 65536, 64, dtype=torch.int32)
    many = m.expand(len(bits), 100).contiguous()
    drawn, state = bits[:, None].expand_as(many), new_state(many)
    moment_codes.quantise(many, torch.full_like(many, scale * scale), state, drawn, drawn)
    kept, _ = moment_codes.dequantise(*state)
    assert all(len(column.unique()) <= 2 for column in kept.T) and not kept[:, 1].any()
    torch.testing.assert_close(kept.double().mean(0), m[0].double(), rtol=2e-3, atol=1e-3 * scale)
