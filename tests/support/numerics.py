"""The one tolerance: at most twice as far from the float64 truth as plain torch in the same dtype,
plus a floor.

The floor is what rounding alone can do to a result, whichever processor adds the numbers up, for
plain torch may happen to be exact. With m the largest element of the truth, eps the dtype's and acc
the spacing of the dtype in which sums are kept (fp32, or float64 for float64):

    floor = (4 eps + sqrt(terms) acc) m

A sum of n terms of either sign is rounded 2n times, each time by at most acc / 2 of what has been
summed up, and these errors walk at random: their standard deviation is 0.41 sqrt(n) acc m. The
result itself is rounded a few times more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_ROUNDINGS = 4  # of the result's own dtype


def assert_no_worse(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    what: str = "result",
    *,
    terms: int = 1,
    size: float = 0.0,
) -> None:
    """Compares `actual` (ours) and `plain` (torch, same dtype) with `truth` (float64); NaN and Inf
    must coincide.

    `terms`: how many numbers are added into one element, over all the sums that lie one behind
    another (a gradient of a loss over T rows, H features and V classes: T + H + V); 1 where there
    is no sum. `size`: of what is added up, where it may cancel and be larger than any result.
    """
    assert actual.shape == truth.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    )
    if truth.numel() == 0:
        return
    ours, theirs, exact = (tensor.detach().double() for tensor in (actual, plain, truth))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(exact)), (
            f"{what}: {kind.__name__} differs from the truth"
        )
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    largest = max(size, float(exact[finite].abs().max()))
    error = torch.where(finite, (ours - exact).abs(), 0.0)
    rival = float(torch.where(finite, (theirs - exact).abs(), 0.0).max())
    allowed = 2 * rival + floor(actual.dtype, terms) * largest
    worst = int(error.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.flatten()[worst] <= allowed, (
        f"{what}: off by {error.flatten()[worst]:.3g} at {position}, allowed {allowed:.3g}; "
        f"ours {ours.flatten()[worst]:.9g}, torch {theirs.flatten()[worst]:.9g}, truth "
        f"{exact.flatten()[worst]:.9g}"
    )


def floor(dtype: torch.dtype, terms: int) -> float:
    """What rounding may do to a sum of `terms` numbers, relative to the largest result."""
    kept = torch.promote_types(dtype, torch.float32)
    return _ROUNDINGS * torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(kept).eps


def terms_of(model: nn.Module, tokens: int) -> int:
    """The terms of a gradient of a whole model: the rows that its matrices sum over, and the tokens
    of the loss."""
    return tokens + sum(
        parameter.shape[-1] for parameter in model.parameters() if parameter.ndim > 1
    )


def assert_no_common_factor(
    actual: Tensor, truth: Tensor, dtype: torch.dtype, what: str = "result"
) -> None:
    """Raises if all of `actual` is off by one factor, as it is where a scale was rounded to
    `dtype`, of 16 bits.

    Elements' own roundings average out: the factor that fits best is 1 to an eighth of the dtype's
    eps, where a scale that was rounded is off by up to a half.
    """
    ours, exact = actual.detach().double().flatten(), truth.detach().double().flatten()
    off = float(ours @ exact / (exact @ exact)) - 1
    allowed = torch.finfo(dtype).eps / 8
    assert abs(off) <= allowed, f"{what}: all of it is off by {off:.2e}, allowed {allowed:.2e}"
