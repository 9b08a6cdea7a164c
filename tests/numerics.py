"""The one tolerance: at most twice as far from the float64 truth as plain torch in the same dtype, plus a floor."""

from __future__ import annotations

import torch

_NOISE = 4  # roundings of the result's own dtype that are granted even where plain torch happens to be exact


def assert_no_worse(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "result") -> None:
    """Compares `actual` (ours) and `plain` (torch, same dtype) with `truth` (float64); NaN and Inf must coincide."""
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    ours, theirs, exact = actual.double(), plain.double(), truth.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(exact)), f"{what}: {kind.__name__} differs from the truth"
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    error = torch.where(finite, (ours - exact).abs(), 0.0)
    allowed = 2 * torch.where(finite, (theirs - exact).abs(), 0.0).max()
    allowed = allowed + _NOISE * torch.finfo(actual.dtype).eps * exact[finite].abs().max()
    worst = int(error.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.flatten()[worst] <= allowed, (
        f"{what}: off by {error.flatten()[worst]:.3g} at {position}, allowed {allowed:.3g}; "
        f"ours {ours.flatten()[worst]:.9g}, torch {theirs.flatten()[worst]:.9g}, truth {exact.flatten()[worst]:.9g}"
    )
