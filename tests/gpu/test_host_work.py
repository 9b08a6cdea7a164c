"""What a step costs the host is the same for any number of tensors, rows and tokens; see
test_kernel_table.py too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.host_work import Work, adamw, attention, batch, stand_ins, work_of

SIZES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "parameters": (adamw, {"tensors": 8}, {"tensors": 100}),
    "clipped parameters": (
        adamw,
        {"tensors": 8, "max_grad_norm": 1.0},
        {"tensors": 100, "max_grad_norm": 1.0},
    ),
    "parameters counted on the device": (
        adamw,
        {"tensors": 8, "capturable": True},
        {"tensors": 100, "capturable": True},
    ),
    "parameters, others than before": (
        adamw,
        {"tensors": 8, "present": False},
        {"tensors": 100, "present": False},
    ),
    "rows of attention": (attention, {"rows": 2, "chunk": 16}, {"rows": 4, "chunk": 16}),
    "tokens of a batch": (batch, {"tokens": 64}, {"tokens": 4096}),
}


@pytest.mark.parametrize("name", SIZES)
def test_it_does_not_grow(name: str) -> None:
    piece, small, large = SIZES[name]
    with stand_ins():
        one, other = (work_of(piece(**options)) for options in (small, large))
    assert one == other


def test_counting() -> None:
    """By hand: views and empty tensors are operations, and launch nothing."""
    import torch

    def prepare(mode: Any) -> Callable[[], Any]:
        x = torch.ones(4, 4, device=mode.device)
        return lambda: (x.T + 1, torch.empty_like(x), x.sum().item())

    work = work_of(prepare)
    assert isinstance(work, Work) and (work.operations, work.launches, len(work.waits)) == (5, 3, 1)
