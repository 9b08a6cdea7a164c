"""The root mean square norm in one pass, against float64."""

from __future__ import annotations

import pytest
import torch
from support.each_instruction_set import printed_by_each
from support.numerics import assert_no_worse
from support.unneeded import Unneeded
from torch import Tensor

from fastft import _native
from fastft.layers import rms_norm as room
from fastft.layers.rms_norm import BACKWARD, FORWARD, rms_norm, takes

DTYPES = [torch.float32, torch.bfloat16]
# rows and widths: no multiple of a register or of a row's 64 lanes, of the 64 rows of a part
SIZES = [(1, 2), (3, 7), (65, 63), (2, 64), (130, 507), (64, 576), (3, 4, 4099)]
EPS, INF, NAN = 1e-6, torch.inf, torch.nan
needs_kernel = pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")


def operands(
    *shape: int, dtype: torch.dtype = torch.float32, size: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of the result."""
    torch.manual_seed(0)
    x, grad = ((torch.randn(*shape) * each).to(dtype) for each in (size, 1.0))
    return x, torch.randn(shape[-1]).to(dtype), grad


def plain(x: Tensor, weight: Tensor, eps: float = EPS, offset: float = 0.0) -> Tensor:
    """As transformers' Llama does it, and with an offset Gemma; in float64 for float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normal * (offset + weight.to(wide.dtype))).type_as(x)
    return weight * normal.to(x.dtype)


def trained(function, x: Tensor, weight: Tensor, grad: Tensor, **options: float) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, **options)
    return [y, *torch.autograd.grad(y, (x, weight), grad)]


def by_kernels(
    x: Tensor, weight: Tensor, grad: Tensor, eps: float = EPS, offset: float = 0.0
) -> list[Tensor]:
    """y, dx and dw, into memory that holds NaN."""
    out, of_x, of_weight = (torch.full_like(each, NAN) for each in (x, x, weight))
    rstd = torch.full((x.numel() // weight.numel(),), NAN)
    FORWARD.native(out, rstd, x, weight, eps, offset)
    BACKWARD.native(of_x, of_weight, grad, x, weight, rstd, offset)
    return [out, of_x, of_weight]


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [1e-3, 3.0, 1e5])
def test_it_is_no_further_from_float64_than_torch(shape, dtype, offset, size):
    given = operands(*shape, dtype=dtype, size=size)
    exact = trained(plain, *(each.double() for each in given), offset=offset)
    torchs = trained(plain, *given, offset=offset)
    for name, found, theirs, truth in zip(
        ("y", "dx", "dw"), by_kernels(*given, offset=offset), torchs, exact, strict=True
    ):
        assert found.dtype == dtype
        assert_no_worse(found, theirs, truth, name)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [INF, -INF, NAN, 3e38, 0.0])
def test_a_row_spoils_no_other(dtype, value):
    """NaN, Inf and what overflows stay in their rows, and dw."""
    x, weight, grad = operands(4, 70, dtype=dtype)
    clean = by_kernels(x, weight, grad)
    x[2, 69] = value
    if value == 0.0:
        x[2] = 0.0
    found, torchs = by_kernels(x, weight, grad), trained(plain, x, weight, grad)
    for of_clean, ours in zip(clean[:2], found[:2], strict=True):
        assert torch.equal(of_clean[[0, 1, 3]], ours[[0, 1, 3]])
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found[0][2], torchs[0][2], equal_nan=True, **close)
    if value != 3e38:  # its square is Inf: torch makes NaN of 0 * Inf in its own gradient, we 0
        assert torch.equal(found[1][2].isnan(), torchs[1][2].isnan())


@needs_kernel
@pytest.mark.parametrize("sign", ["both", "one"])
def test_many_rows_have_a_gradient_as_exact_as_torchs(sign):
    """As the norms of heads have them; where all terms have one sign, sums lose the most."""
    x, weight, grad = operands(40_000, 16)
    if sign == "one":
        x, grad = x.abs(), grad.abs()
    exact = trained(plain, *(each.double() for each in (x, weight, grad)))
    assert_no_worse(
        by_kernels(x, weight, grad)[2], trained(plain, x, weight, grad)[2], exact[2], "dw"
    )


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_has_the_same_bits(dtype):
    given, threads = operands(700, 130, dtype=dtype), torch.get_num_threads()
    whole = None
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found = by_kernels(*given)
        whole = whole or found
        assert all(map(torch.equal, found, whole))
    torch.set_num_threads(threads)
    x, weight, grad = given
    part = by_kernels(x[64:65], weight, grad[64:65])
    assert torch.equal(part[0], whole[0][64:65]) and torch.equal(part[1], whole[1][64:65])


PROGRAM = """
import hashlib, torch
from fastft.layers.rms_norm import BACKWARD, FORWARD
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    for width in (7, 64, 515):
        torch.manual_seed(0)
        x, grad, weight = (torch.randn(size).to(dtype)
                           for size in ((131, width), (131, width), (width,)))
        out, of_x, of_weight, rstd = x.clone(), x.clone(), weight.clone(), torch.empty(131)
        FORWARD.native(out, rstd, x, weight, 1e-6, 1.0)
        BACKWARD.native(of_x, of_weight, grad, x, weight, rstd, 1.0)
        for each in (out, rstd, of_x, of_weight):
            digest.update(each.view(torch.int16).numpy().tobytes())
print(digest.hexdigest())
"""


@needs_kernel
def test_every_instruction_set_has_the_same_bits():
    assert len({*printed_by_each(PROGRAM).values()}) == 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_the_references(dtype):
    x, weight, grad = operands(3, 50, dtype=dtype)
    out, of_x, of_weight = (torch.full_like(each, NAN) for each in (x, x, weight))
    rstd = torch.full((3,), NAN)
    FORWARD.reference(out, rstd, x, weight, EPS, 1.0)
    BACKWARD.reference(of_x, of_weight, grad, x, weight, rstd, 1.0)
    exact = trained(plain, *(each.double() for each in (x, weight, grad)), offset=1.0)
    torchs = trained(plain, x, weight, grad, offset=1.0)
    for found, theirs, truth in zip((out, of_x, of_weight), torchs, exact, strict=True):
        assert_no_worse(found, theirs, truth)


@needs_kernel
def test_nothing_to_compute():
    x, weight = torch.empty(0, 7, requires_grad=True), torch.ones(7, requires_grad=True)
    y = rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 7) and not weight.grad.any()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd_and_what_does_not_lie_in_order(dtype):
    x, weight, grad = operands(40, 30, dtype=dtype)
    x, weight, grad = x.T.contiguous().T, weight.repeat_interleave(2)[::2], grad.T.contiguous().T
    exact = trained(plain, *(each.double() for each in (x, weight, grad)))
    found = trained(lambda *two: rms_norm(*two, EPS), x, weight, grad)
    for ours, theirs, truth in zip(found, trained(plain, x, weight, grad), exact, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, theirs, truth)


@needs_kernel
@pytest.mark.parametrize("trains", ["x", "weight"])
def test_who_needs_no_gradient_gets_none(trains):
    x, weight, grad = operands(5, 30)
    (x if trains == "x" else weight).requires_grad_()
    rms_norm(x, weight, EPS).backward(grad)
    assert (x.grad is None) == (trains == "weight") and (weight.grad is None) == (trains == "x")


@needs_kernel
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_have_gradients_and_may_be_many(offset):
    x, weight, grad = (each.requires_grad_() for each in operands(4, 5))
    found = []
    for function in (rms_norm, plain):
        y = function(x, weight, EPS, offset)
        first = torch.autograd.grad(y, (x, weight), grad, create_graph=True)
        second = torch.autograd.grad(sum(each.pow(2).sum() for each in first), (x, weight, grad))
        many = torch.autograd.grad(
            function(x, weight, EPS, offset),
            (x, weight),
            torch.eye(20).view(20, 4, 5),
            is_grads_batched=True,
        )
        found.append((*first, *second, *many))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert torch.autograd.gradcheck(
        lambda a, b: room._gradients(grad.double(), a, b, EPS, offset),
        [each.double().detach().requires_grad_() for each in (x, weight)],
    )


@needs_kernel
def test_a_result_that_nobody_needs():
    x, weight, _ = (each.requires_grad_() for each in operands(3, 9))
    y = Unneeded.apply(rms_norm(x, weight, EPS)).sum()
    assert torch.autograd.grad(y, (x, weight), allow_unused=True) == (None, None)


@needs_kernel
def test_hooks_may_give_saved_tensors_back_in_other_ways():
    given = operands(6, 8)
    expected = trained(plain, *given)
    for pack, unpack in (
        (lambda kept: kept.mT.contiguous() if kept.ndim > 1 else kept, lambda kept: kept),
        (lambda kept: kept.double(), lambda kept: kept),
    ):

        def again(kept, unpack=unpack):
            return unpack(kept).mT if kept.shape == (8, 6) else unpack(kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, again):
            found = trained(lambda *two: rms_norm(*two, EPS), *given)
        torch.testing.assert_close([each.float() for each in found], expected)


@needs_kernel
def test_what_is_kept():
    x, weight, _ = (each.requires_grad_() for each in operands(30, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert sorted(each.numel() for each in kept) == [30, 64, 30 * 64]


@needs_kernel
def test_backward_twice_and_operands_that_have_changed():
    x, weight, grad = operands(5, 50)
    x.requires_grad_()
    y = rms_norm(x, weight, EPS)
    twice = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


@needs_kernel
def test_the_device_of_new_tensors_has_no_part_in_it():
    given = operands(5, 30)
    expected = trained(plain, *given)
    with torch.device("meta"):
        found = trained(lambda *two: rms_norm(*two, EPS), *given)
    torch.testing.assert_close(found, expected)


def test_which_tensors_it_takes():
    def of(*shape, **options):
        return torch.empty(*shape, **options)

    assert takes(of(8, 4096), of(4096)) and takes(of(8, 4096), torch.nn.Parameter(of(4096)))
    assert takes(*(of(*shape, dtype=torch.bfloat16) for shape in ((8, 4096), (4096,))))
    assert not takes(of(1, 4095), of(4095)) and not takes(of(8, 4096), of(4095))
    assert not takes(of(8, 4096, dtype=torch.bfloat16), of(4096))
    assert not takes(*(of(*shape).half() for shape in ((8, 4096), (4096,))))
    assert not takes(of(8, 4096, device="meta"), of(4096)) and not takes(of(1 << 12), of(()))
    assert not takes(torch.nn.Parameter(of(8, 4096)), of(4096))
    with torch.overrides.BaseTorchFunctionMode():
        assert not takes(of(8, 4096), of(4096))
    with torch.inference_mode():
        unsaveable = of(8, 4096)
    assert not takes(unsaveable, of(4096))


X, W, R = torch.empty(3, 4), torch.empty(4), torch.empty(3)


@needs_kernel
@pytest.mark.parametrize(
    ("out", "rstd", "x", "weight", "message"),
    [
        (X.half(), R, X.half(), W.half(), "x must be float32 or bfloat16"),
        (X, R, X, torch.empty(5), "x must have rows of weight's size"),
        (X, R, X, torch.empty(0), "x must have rows of weight's size"),
        (X, R, X, W.bfloat16(), "weight must be contiguous"),
        (torch.empty(4), R, X, W, "out must be contiguous"),
        (X, torch.empty(2), X, W, "rstd must be contiguous float32"),
        (X, R.double(), X, W, "rstd must be contiguous float32"),
        (X.T.contiguous(), R, X.T.contiguous().T, W, "x must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(out, rstd, x, weight, message):
    with pytest.raises(RuntimeError, match=message):
        FORWARD.native(out, rstd, x, weight, EPS, 0.0)
    with pytest.raises(RuntimeError, match=message.replace("out", "grad_x")):
        BACKWARD.native(out, torch.empty_like(weight), x, x, weight, rstd, 0.0)


@needs_kernel
def test_gradients_that_do_not_fit_are_refused():
    for of_weight, grad, message in (
        (torch.empty(3), X, "grad_weight must be"),
        (W.bfloat16(), X, "grad_weight must be"),
        (W, torch.empty(2, 4), "grad must be"),
        (W, X.bfloat16(), "grad must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            BACKWARD.native(torch.empty_like(X), of_weight, grad, X, W, R, 0.0)
