from __future__ import annotations

import pytest
import torch
from support.adamw_steps import ENGINES

from fastft.optim.grad_norm import (
    CHUNK,
    GRAD_NORM,
    NORM_TOTAL,
    SQUARE_SUMS,
    clip_factor,
    grad_norm,
)

SHAPES = [(1,), (0,), (63,), (507,), (16384,), (16385,), (3, 5, 7), ()]


def gradients(dtype, scale=1.0):
    return [(torch.randn(shape) * scale).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])  # squares beyond the range of float32
def test_the_rounded_float64_norm(impl, dtype, scale):
    grads = gradients(dtype, scale)
    truth = torch.cat([grad.double().flatten() for grad in grads]).norm()
    norm = grad_norm(grads, impl)
    assert norm.dtype == torch.float32 and norm.shape == ()
    torch.testing.assert_close(norm.double(), truth, rtol=1e-7, atol=0)


@pytest.mark.parametrize("impl", ENGINES)
def test_layouts_mixed_dtypes_and_nothing(impl):
    base = torch.randn(30, 40)
    grads = [base.t(), base[:, ::2], base.bfloat16().t()]
    truth = torch.cat([grad.double().flatten() for grad in grads]).norm()
    torch.testing.assert_close(grad_norm(grads, impl).double(), truth, rtol=1e-7, atol=0)
    assert grad_norm([], impl) == 0 and grad_norm([torch.zeros(0)], impl) == 0


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 15, 16, 506])
def test_not_finite_exactly_where_a_gradient_is_not(impl, bad, dtype, position):
    grads = gradients(dtype)
    grads[3][position] = bad
    norm = grad_norm(grads, impl)
    assert norm.isnan() if bad != bad else norm.isposinf()


@pytest.mark.parametrize("max_norm", [0.5, 1e6, float("inf")])
@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
def test_the_factor_is_torchs(max_norm, bad):
    params = [torch.nn.Parameter(torch.zeros(64))]
    params[0].grad = torch.randn(64)
    params[0].grad[3] = bad
    grad = params[0].grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(params, max_norm)
    norm = grad_norm([grad])
    torch.testing.assert_close(norm, expected, equal_nan=True)
    torch.testing.assert_close(grad * clip_factor(norm, max_norm), params[0].grad, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_sums_and_their_total_in_every_engine(dtype):
    grads = [grad.contiguous() for grad in gradients(dtype)]
    count = sum(-(-grad.numel() // CHUNK) for grad in grads)
    sums, plain = torch.empty(2, count, dtype=torch.float64)
    SQUARE_SUMS.native(sums, grads)
    SQUARE_SUMS.reference(plain, grads)
    torch.testing.assert_close(sums, plain, rtol=1e-13, atol=0)
    total, other, at_once = torch.empty(3, dtype=torch.float64)
    NORM_TOTAL.native(total, sums)
    NORM_TOTAL.reference(other, sums)
    GRAD_NORM.native(at_once, grads)
    assert total == other == at_once


def of_sixteen_lanes(grad):
    """The sum of squares in double precision that every instruction set has to the bit."""
    padded = torch.nn.functional.pad(grad.double(), (0, -grad.numel() % 16)).square()
    lanes = torch.zeros(16, dtype=torch.float64)
    for squares in padded.view(-1, 16):
        lanes += squares
    while lanes.numel() > 1:
        lanes = lanes[: lanes.numel() // 2] + lanes[lanes.numel() // 2 :]
    return lanes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 15, 16, 17, 31, 32, 33, 47, 63, 507, 4097])
def test_every_instruction_set_adds_in_the_same_order(dtype, numel):
    if GRAD_NORM.resolve("auto", torch.device("cpu")) != "cpp":
        pytest.skip("of the C++ engine alone")
    # magnitudes so far apart that the order shows
    grad = (torch.randn(numel) * torch.logspace(-12, 12, numel)[torch.randperm(numel)]).to(dtype)
    total = torch.empty(1, dtype=torch.float64)
    GRAD_NORM.native(total, [grad])
    assert torch.equal(total, of_sixteen_lanes(grad))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda sums, grad: SQUARE_SUMS.native(sums, [grad]), "must have 2 elements, has 3"),
        (lambda sums, grad: SQUARE_SUMS.native(sums.float(), [grad]), "contiguous float64"),
        (lambda sums, grad: SQUARE_SUMS.native(sums[:2], [grad.half()]), "gradient 0 is not"),
        (lambda sums, grad: NORM_TOTAL.native(sums, sums), "total must have 1 elements, has 3"),
    ],
)
def test_sums_that_do_not_fit(call, sentence):
    if GRAD_NORM.resolve("auto", torch.device("cpu")) != "cpp":
        pytest.skip("plain torch checks nothing")
    with pytest.raises(RuntimeError, match=sentence):
        call(torch.zeros(3, dtype=torch.float64), torch.zeros(CHUNK + 1))
