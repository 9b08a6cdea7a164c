"""The refusal of accelerate's `dispatch_batches`, which cuts packed batches into pieces that fit no
model.

With it rank 0 loads all batches, joins them along dimension 0 and gives each rank a slice of every
tensor. A packed batch has its boundaries in dimension 0: even on one rank only the first of them is
left, and nothing raises. It is accelerate's default for an iterable dataset.
"""

from __future__ import annotations

from typing import Any

from fastft.foreign import active_dataloader, dispatches

REFUSAL = (
    "accelerate would slice packed batches along dimension 0, and their boundaries with them "
    "(dispatch_batches, its default for an iterable dataset); each rank has to load its own "
    "batches: TrainingArguments(accelerator_config={'dispatch_batches': False})"
)


def refuse_dispatch(dataset: Any) -> None:
    """Raises ValueError if accelerate is about to dispatch the batches of `dataset`.

    To be called where the loader hands over, `set_epoch` and `__iter__`: accelerate has then made
    it the active one.
    """
    active = active_dataloader()
    if dispatches(active) and active.dataset is dataset:
        raise ValueError(REFUSAL)
