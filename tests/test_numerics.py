"""The tolerance itself: any order of a sum passes, whatever plain torch's luck, and a planted error
does not."""

from __future__ import annotations

import pytest
import torch
from support.numerics import assert_no_worse
from torch import Tensor

ROWS = 63
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def factors(terms: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, terms).to(dtype), torch.randn(ROWS, terms).to(dtype)


def one_after_another(x: Tensor, y: Tensor) -> Tensor:
    """The worst order: every partial sum is rounded, in fp32 or better."""
    kept = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(x), dtype=kept)
    for index in range(x.shape[1]):
        total += x[:, index].to(kept) * y[:, index].to(kept)
    return total.to(x.dtype)


def truth_of(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y.double()).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [1, 7, 63, 507, 4096])
def test_a_sum_in_any_order_passes_where_plain_torch_is_exact(
    terms: int, dtype: torch.dtype
) -> None:
    x, y = factors(terms, dtype)
    truth = truth_of(x, y)
    for order in (torch.arange(terms), torch.arange(terms).flip(0), torch.randperm(terms)):
        assert_no_worse(
            one_after_another(x[:, order], y[:, order]), truth.to(dtype), truth, terms=terms
        )


def without_a_term(x: Tensor, y: Tensor) -> Tensor:
    return truth_of(x[:, 1:], y[:, 1:])


def with_neighbouring_rows(x: Tensor, y: Tensor) -> Tensor:
    return truth_of(x, y.roll(1, 0))


def with_a_nan(x: Tensor, y: Tensor) -> Tensor:
    truth = truth_of(x, y)
    truth[17] = torch.nan
    return truth


def rounded_factors(x: Tensor, y: Tensor) -> Tensor:
    """As if computed in bf16 (in 4 bits for 16-bit dtypes)."""
    if x.dtype.itemsize > 2:
        return truth_of(x.bfloat16(), y.bfloat16())
    return truth_of(x.to(torch.float8_e5m2), y.to(torch.float8_e5m2))


def off_by_a_tenth(x: Tensor, y: Tensor) -> Tensor:
    truth = truth_of(x, y)
    return torch.where(truth.abs() == truth.abs().max(), truth * 1.1, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [7, 63, 507])
@pytest.mark.parametrize(
    "fault", [without_a_term, with_neighbouring_rows, with_a_nan, rounded_factors, off_by_a_tenth]
)
def test_a_planted_error_fails(fault, terms: int, dtype: torch.dtype) -> None:
    x, y = factors(terms, dtype)
    truth = truth_of(x, y)
    with pytest.raises(AssertionError, match=r"off by|isnan differs"):
        assert_no_worse(fault(x, y).to(dtype), one_after_another(x, y), truth, terms=terms)


@pytest.mark.parametrize("factor", [1.01, 1.001, 1.0001])
def test_a_factor_that_is_off_fails_in_fp32(factor: float) -> None:
    x, y = factors(507, torch.float32)
    with pytest.raises(AssertionError, match="off by"):
        assert_no_worse(
            (truth_of(x, y) * factor).float(), one_after_another(x, y), truth_of(x, y), terms=507
        )
