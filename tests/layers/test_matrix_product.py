"""Products in fp32 on the CPU, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastft import _native, linear_cross_entropy
from fastft.integrations import linear_products
from fastft.layers import matrix_product

PRODUCT = matrix_product.PRODUCT
SHAPES = [(1, 1, 1), (5, 3, 7), (14, 192, 32), (63, 507, 65), (169, 193, 2049), (3, 8193, 47)]
DTYPES = [torch.float32, torch.bfloat16]
needs_kernel = pytest.mark.skipif(bool(_native.missing("cpu")), reason="not built")


def error(found, best):
    return float((found - best).norm() / best.norm())


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, repeat=2)], ids=str)
def test_any_shape_dtypes_and_strides(shape, dtypes):
    rows, terms, columns = shape
    torch.manual_seed(0)
    a, b = torch.randn(rows, terms).to(dtypes[0]), torch.randn(terms, columns).to(dtypes[1])
    exact = a.double() @ b.double()
    wide = torch.full((rows, columns + 3), torch.nan)
    for left, right in itertools.product((a, a.T.contiguous().T), (b, b.T.contiguous().T)):
        out = wide[:, 1:-2]
        PRODUCT.native(out, left, right, False)
        # no term or sum of the kernel is longer in a row than one of torch's
        allowed = 1.5 * error(a.float() @ b.float(), exact) + 1e-7
        assert error(out, exact) <= allowed
        PRODUCT.native(out, left, right, True)
        assert error(out, 2 * exact) <= allowed
    assert wide[:, [0, -2, -1]].isnan().all()


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_nothing_to_add_up(shape):
    rows, terms, columns = shape
    left, right = torch.empty(rows, terms), torch.empty(terms, columns)
    out = torch.full((rows, columns), torch.nan)
    PRODUCT.native(out, left, right, False)
    assert torch.equal(out, left @ right)
    PRODUCT.native(out.fill_(2.0), left, right, True)
    assert (out == 2.0).all()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e-42], ids=str)
def test_what_is_no_normal_number_goes_where_torch_lets_it(value, dtype):
    torch.manual_seed(0)
    left, right = torch.randn(15, 200).to(dtype), torch.randn(200, 33).to(dtype)
    left[:, ::5], right[3] = 0.0, 0.0  # 0 * Inf is NaN
    left[7, 3], left[14, 0], right[199, 32] = value, value, value
    expected = (left.double() @ right.double()).float()
    for add in (False, True):
        out = torch.full((15, 33), 1.0 if add else torch.nan)
        PRODUCT.native(out, left, right, add)
        torch.testing.assert_close(out, expected + add, rtol=1e-5, atol=1e-4, equal_nan=True)


@needs_kernel
def test_threads_change_no_bit():
    left, right = torch.randn(507, 511), torch.randn(511, 130)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(torch.empty(507, 130))
        PRODUCT.native(results[-1], left, right, False)
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


@needs_kernel
@pytest.mark.parametrize(
    ("out", "left", "right", "message"),
    [
        (torch.empty(2, 3), torch.empty(2, 4), torch.empty(5, 3), "shapes do not fit"),
        (torch.empty(3, 2).T, torch.empty(2, 4), torch.empty(4, 3), "contiguous rows"),
        (torch.empty(3).expand(2, 3), torch.empty(2, 4), torch.empty(4, 3), "rows of their own"),
        (torch.empty(2, 3), torch.empty(2, 4).half(), torch.empty(4, 3), "left must be float32"),
        (torch.empty(2, 3), torch.empty(2, 4), torch.empty(4), "right must be a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(out, left, right, message):
    with pytest.raises(RuntimeError, match=message):
        PRODUCT.native(out, left, right, False)


@needs_kernel
def test_out_that_shares_memory_with_a_factor_is_refused():
    """It would be read after it was written."""
    memory, other = torch.ones(300), torch.ones(10, 10)
    out, beside = memory[:100].view(10, 10), memory[100:200].view(10, 10)
    # at one number, and seen as other numbers
    end, halves = memory[99:199].view(10, 10), memory[50:100].view(torch.bfloat16).view(10, 10)
    for factor in (out, out.T, end, halves):
        for factors in ((factor, other), (other, factor)):
            with pytest.raises(RuntimeError, match="must not share memory with a factor"):
                PRODUCT.native(out, *factors, False)
    PRODUCT.native(out, beside, other, False)
    assert (out == 10).all()
    # nothing is read of a factor without terms
    PRODUCT.native(out, memory[50:50].view(10, 0), memory[60:60].view(0, 10), False)
    assert (out == 0).all()


def test_the_reference():
    a, b = torch.randn(5, 7, dtype=torch.bfloat16), torch.randn(7, 3)
    out = torch.empty(5, 3)
    PRODUCT.reference(out, a, b, False)
    PRODUCT.reference(out, a, b, True)
    torch.testing.assert_close(out, 2 * (a.float() @ b))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_whose_products_they_are_is_as_exact_as_with_torchs(dtype, monkeypatch):
    from fastft.loss import head_gemms

    torch.manual_seed(0)
    x, weight = torch.randn(130, 96).to(dtype), torch.randn(515, 96).to(dtype)
    bias, target = torch.randn(515).to(dtype), torch.randint(0, 515, (130,))
    calls = []
    native = PRODUCT.native
    monkeypatch.setattr(PRODUCT, "native", lambda *args: (calls.append(1), native(*args)))
    monkeypatch.setattr(head_gemms, "is_emulated", lambda dtype, _: dtype == torch.bfloat16)

    def gradients(loss, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        return torch.autograd.grad(loss(*leaves), leaves)

    exact = gradients(lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target), torch.float64)
    errors = []
    for ahead in (False, True):
        monkeypatch.setattr(matrix_product, "is_ahead", lambda ahead=ahead: ahead)
        found = gradients(
            lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=65), dtype
        )
        errors.append([error(mine, best) for mine, best in zip(found, exact, strict=True)])
        assert len(calls) == (6 if ahead else 0)
    assert all(mine <= 1.1 * torchs for torchs, mine in zip(*errors, strict=True)), errors


@pytest.mark.parametrize(
    "isa, ahead, in_layers",
    [
        ("avx512bf16", True, True),
        ("avx512", True, True),
        ("avx2", True, False),
        ("baseline", False, False),
        (None, False, False),
    ],
)
def test_it_is_ahead_where_the_processor_is_not_intels(isa, ahead, in_layers, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(_native, "is_intel", lambda: False)
    monkeypatch.setattr(_native, "cpu_isa", lambda: isa)
    assert matrix_product.is_ahead() == ahead
    assert linear_products.is_ahead() == in_layers
    monkeypatch.setattr(_native, "is_intel", lambda: True)
    assert not matrix_product.is_ahead() and not linear_products.is_ahead()
