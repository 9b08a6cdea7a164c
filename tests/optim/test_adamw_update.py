"""The ways in which AdamW keeps parameters and moments: the same bits everywhere, and what each is
good for."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.adamw_steps import ENGINES, equal, gradients, needs_native, start, states, train
from torch.nn import Parameter

from fastft.optim.adamw import AdamW
from fastft.optim.adamw_update import ADAMW, Rounding, join_master, random_bits, split_master

ROUNDINGS = ["exact", "kahan", "stochastic", "nearest"]
BF16 = torch.bfloat16


def test_philox_known_answer():
    # of the paper's authors: seven rounds, counter 0, key 0
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert random_bits(0, 8, 0, 0, 0, torch.device("cpu")).tolist() == halves


def test_random_bits_depend_on_everything_but_the_split():
    def draw(first=5, step=3, stream=1, seed=2**40 + 7):
        return random_bits(first, 1000, step, stream, seed, torch.device("cpu"))

    whole = random_bits(0, 3000, 3, 1, 2**40 + 7, torch.device("cpu"))
    assert torch.equal(draw(), whole[5:1005]) and whole.min() >= 0 and whole.max() <= 65535
    assert abs(whole.double().mean() - 32767.5) < 5 * 65536 / (12 * 3000) ** 0.5
    for other in (draw(first=6), draw(step=4), draw(stream=2), draw(seed=7), draw(first=5 + 2**35)):
        assert (other == draw()).float().mean() < 0.01


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize(
    ("rounding", "moments"), [("stochastic", "bf16"), ("kahan", "bf16"), ("exact", "fp32")]
)
def test_pieces_of_a_tensor_get_the_bits_of_the_whole(impl, rounding, moments):
    grads = [[grad.to(BF16) for grad in row] for row in gradients([(2000,)], 1)]
    whole = AdamW(start([(2000,)], BF16), rounding=rounding, moments=moments, seed=3, impl=impl)
    (expected,) = train(whole, grads)
    param, update = (
        start([(2000,)], BF16)[0].detach(),
        ADAMW.implementation(impl, torch.device("cpu")),
    )
    hyper = torch.tensor([[1 - 1e-5, 0.1, 0.999, 0.001, -1e-2, 0.001**0.5, 1e-8, 1.0, 1.0]])
    state = [
        torch.zeros(2000, dtype=BF16 if moments == "bf16" else torch.float32) for _ in range(2)
    ]
    residue = torch.zeros(2000, dtype=torch.int16 if rounding == "exact" else BF16)
    for begin, end in ((0, 7), (7, 600), (600, 1999), (1999, 2000)):
        piece, grad, m, v, kept = (t[begin:end] for t in (param, grads[0][0], *state, residue))
        table = torch.tensor([[0, Rounding[rounding.upper()], 0, begin]])
        update(
            [piece],
            [grad],
            [m],
            [v],
            [],
            [kept] if rounding != "stochastic" else [],
            table,
            hyper,
            torch.ones(()),
            3,
        )
    equal([state[0], state[1]], [states(whole, "exp_avg")[0], states(whole, "exp_avg_sq")[0]])
    torch.testing.assert_close(param, expected.detach(), rtol=1e-2, atol=1e-2)


@needs_native
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_no_element_is_left_out_at_any_size(rounding, moments):
    shapes = [(size,) for size in range(1, 70)]
    grads = [[grad.to(BF16) for grad in row] for row in gradients(shapes, 2)]
    options = {"rounding": rounding, "moments": moments, "seed": 3}
    native, eager = (AdamW(start(shapes, BF16), impl=impl, **options) for impl in ("cpp", "eager"))
    equal(train(native, grads), train(eager, grads))


def distance(rounding, moments, steps=400):
    """Largest distance from fp32 AdamW, in units of the largest error of rounding to bf16."""
    wide = [Parameter(param.detach().float()) for param in start([(507,)], BF16)]
    grads = [[grad.to(BF16) for grad in row] for row in gradients([(507,)], steps)]
    options = {"lr": 1e-4, "weight_decay": 0.1}
    (fp32,) = train(torch.optim.AdamW(wide, **options), grads)
    (ours,) = train(
        AdamW(start([(507,)], BF16), rounding=rounding, moments=moments, seed=0, **options), grads
    )
    return float(((ours.float() - fp32).abs() / (fp32.abs() * 2**-8)).detach().max())


def test_what_each_rounding_loses():
    assert distance("exact", "fp32") <= 1
    assert distance("kahan", "fp32") <= 1.01
    assert distance("nearest", "fp32") > 5


def test_seeds():
    def trained(seed, draw_from=0):
        torch.manual_seed(draw_from)
        optimizer = AdamW(
            [Parameter(torch.ones(2000, dtype=BF16))], rounding="stochastic", seed=seed
        )
        return train(optimizer, [[torch.ones(2000)]] * 5)[0].detach(), optimizer.param_groups[0][
            "seed"
        ]

    assert torch.equal(trained(7)[0], trained(7, 1)[0]) and not torch.equal(
        trained(7)[0], trained(8)[0]
    )
    assert trained(None)[1] == trained(None)[1] != trained(None, 1)[1]
    before = torch.get_rng_state()
    # nothing to draw for: dropout stays as it was
    assert AdamW(start([(3,)])).param_groups[0]["seed"] is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("error")
def test_one_warning_for_fp32_parameters():
    with pytest.warns(UserWarning, match="rounding='kahan'") as caught:
        optimizer = AdamW([{"params": start([(3,)])}, {"params": start([(4,)])}], rounding="kahan")
    assert len(caught) == 1
    train(optimizer, gradients([(3,), (4,)], 1))
    assert "kahan" not in next(iter(optimizer.state.values()))
    AdamW(start([(3,)], BF16), rounding="kahan")


@needs_native
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_bf16_pair_is_stored_alike(rounding):
    # lr 0 and weight_decay 0: loading and storing alone, over every parameter and some residues
    values = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16)
    for low in (0, 1, 0x7FFF, -0x8000, -1, 0x1234):
        results = []
        for impl in ("cpp", "eager"):
            param = Parameter(values.clone().view(BF16))
            param.grad = torch.zeros_like(param)
            optimizer = AdamW(
                [param], lr=0.0, weight_decay=0.0, impl=impl, rounding=rounding, seed=0
            )
            optimizer.step()
            for name in optimizer.state[param].keys() & {"remainder", "kahan"}:
                optimizer.state[param][name].view(torch.int16).fill_(low)
            with torch.no_grad():
                param.view(torch.int16).copy_(values)
            optimizer.step()
            results.append([param.detach(), *optimizer.state[param].values()])
        equal(results[0], results[1])
        finite, zero = (values & 0x7F80) != 0x7F80, (values & 0x7FFF) == 0
        if rounding != "kahan" or low == 0:
            assert torch.equal(
                results[0][0].view(torch.int16)[finite & ~zero], values[finite & ~zero]
            )


def test_split_and_join_lose_no_bit():
    # every remainder at the exponents and signs where carries, ties, denormals, Inf and NaN live
    low = torch.arange(0x10000, dtype=torch.int32)
    highs = (0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x3FFF, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF)
    for high, sign in itertools.product(highs, (0, 0x8000)):
        bits = ((((high | sign) << 16) ^ 0x80000000) - 0x80000000) + low
        master = bits.view(torch.float32)
        param, remainder = torch.empty(0x10000, dtype=BF16), torch.empty(0x10000, dtype=torch.int16)
        split_master(master, param, remainder)
        back, nan = join_master(param, remainder), master.isnan()
        assert torch.equal(back.view(torch.int32)[~nan], bits[~nan])
        assert back[nan].isnan().all() and param[nan].isnan().all()
        regular = ~nan & (low != 0x8000)
        assert torch.equal(
            param.view(torch.int16)[regular], master.bfloat16().view(torch.int16)[regular]
        )
