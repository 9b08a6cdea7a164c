"""What `offload` and `release_gradients` do not go with: a sentence, before anything is trained.

Which gradients cannot be taken is known when there are some: hooks.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastft.checks import boolean
from fastft.foreign import engines
from fastft.optim.offload.tiers import TIERS

if TYPE_CHECKING:
    from fastft.optim.adamw import AdamW

OFFLOADS = (*TIERS, "auto")


def check_offload(
    offload: str | None, release_gradients: bool, max_grad_norm: float | None
) -> None:
    """Raises where they are no tier, or do not go together."""
    if offload not in OFFLOADS:
        raise ValueError(
            f"offload must be one of {', '.join(map(repr, OFFLOADS))}, got {offload!r}"
        )
    boolean("release_gradients", release_gradients)
    if release_gradients and offload is not None:
        raise ValueError(
            f"release_gradients=True with offload={offload!r}: the one uses gradients up inside "
            "backward, where the other keeps them or their states on the host. Leave out one of "
            'them; offload="gradients" frees them on the device as well'
        )
    if release_gradients and max_grad_norm is not None:
        raise ValueError(
            "release_gradients=True with max_grad_norm: the norm of all gradients is known only "
            "after backward, when they would be gone. Leave out one of them; "
            'offload="gradients" frees them on the device, and clips exactly'
        )


def check_capturable(group: dict[str, Any], offload: str | None, release_gradients: bool) -> None:
    """Raises where steps of a group are to be captured that go on outside of a CUDA graph."""
    what = "release_gradients=True" if release_gradients else f"offload={offload!r}"
    if group["capturable"] and (offload is not None or release_gradients):
        raise ValueError(
            f"capturable=True with {what} is not implemented: a CUDA graph would repeat one "
            "step's copies and counts. Leave out one of them"
        )


def check_engine() -> None:
    """Raises where an engine needs gradients when backward has made them."""
    if engines.gradients_are_parts():
        raise ValueError(
            "offload='gradients' and release_gradients take gradients as backward makes them, "
            "where DeepSpeed and FSDP1 still cut them into flat parts: use offload='states', "
            "or FSDP2"
        )


def check_step(optimizer: AdamW, closure: Any) -> None:
    """Raises for what a step over gradients that are not on the device cannot do."""
    if hasattr(optimizer, "found_inf") or hasattr(optimizer, "grad_scale"):
        raise RuntimeError(
            "GradScaler looks for Inf in gradients that are freed as backward makes them "
            "(offload='gradients' or 'overlap', release_gradients): train in bf16, or use "
            "offload='states'"
        )
    if closure is not None and optimizer.release_gradients:
        raise RuntimeError(
            "a closure's backward pass would update before step() does: call step() without "
            "one, or leave out release_gradients"
        )
