"""Packed batches in `transformers.Trainer`: their sequences are kept apart, or nothing is trained."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from fastft.attention.block_mask import attention_configs, block_mask
from fastft.attention.check_packing import Leak, PackingLeakError, find_leak
from fastft.attention.segments import packed_attention
from fastft.data.collator import PackingCollator
from fastft.foreign import dispatches

logger = logging.get_logger(f"transformers.{__name__}")  # below "transformers", so that its verbosity rules

_ON_LEAK = ("error", "warn")
_verdicts: dict[Any, Leak | None] = {}


class PackingCallback(TrainerCallback):
    """From train begin to train end the model keeps the sequences of a `PackingCollator`'s batches apart.

    At train begin the model is probed as `fastft.check_packing` does it, once in a process for each class and
    configuration. A model with attention code of its own for which a mask of T x T is exact gets that. Batches of
    other collators, such as those of an evaluation, are left alone.

    Args:
        on_leak: `"error"`: raise where the model would be trained on contaminated batches; `"warn"`: say so and train.

    Raises:
        PackingLeakError: from `train()`, with the reason and the way out.
        ValueError: another `on_leak`.

    `FusedLossCallback` does all this too, so that only one of the two is needed. An exception out of `train()` leaves
    the model's hooks on, because Trainer then calls no callback: `restore()` takes them off, and so does the next
    `train()`.
    """

    def __init__(self, on_leak: str = "error") -> None:
        if on_leak not in _ON_LEAK:
            raise ValueError(f"on_leak must be 'error' or 'warn', got {on_leak!r}")
        self.on_leak = on_leak
        self._kept = contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Probes the model and keeps its sequences apart, after `restore()`: auto_find_batch_size begins anew."""
        self.restore()
        model, loader = kwargs["model"], kwargs.get("train_dataloader")
        collator = packing_collator(loader)
        if collator is None:
            logger.warning("fastft: PackingCallback does nothing: batches do not come from a fastft.PackingCollator")
            return
        if args.n_gpu > 1:
            self._complain("DataParallel cuts a packed batch between its devices; start one process for each instead")
        if dispatches(loader):
            self._complain(
                "accelerate cuts packed batches along dimension 0, and their boundaries with them; set "
                "TrainingArguments(accelerator_config={'dispatch_batches': False})"
            )
        leak = _verdict(model, collator.position_ids_start)
        if leak is not None and leak.block_mask:
            logger.warning(f"fastft: {type(model).__name__} gets an attention mask of T x T: {leak.what}")
        elif leak is not None:
            self._complain(f"{type(model).__name__} does not keep packed sequences apart: {leak}")
        keep = block_mask if leak is not None and leak.block_mask else packed_attention
        self._kept.enter_context(keep(model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves no trace."""
        self.restore()

    def restore(self) -> None:
        """Takes the model back to stock. Harmless when called twice."""
        self._kept.close()

    def _complain(self, message: str) -> None:
        if self.on_leak == "error":
            raise PackingLeakError(message)
        logger.warning(f"fastft: training on contaminated batches: {message}")


def packing_collator(dataloader: Any) -> PackingCollator | None:
    """The collator of a loader's batches, looked up inside Trainer's wrapper that removes columns."""
    collator: Any = getattr(dataloader, "collate_fn", None)
    while not isinstance(collator, PackingCollator) and hasattr(collator, "data_collator"):
        collator = collator.data_collator
    return collator if isinstance(collator, PackingCollator) else None


def _verdict(model: nn.Module, start: int) -> Leak | None:
    """What the probe finds while sequences are kept apart; None also where it cannot be asked, with a warning."""
    key = (
        start,
        frozenset(type(module) for module in model.modules()),
        tuple((config.to_json_string(), config._attn_implementation) for config in attention_configs(model)),
        frozenset((parameter.dtype, parameter.device.type) for parameter in model.parameters()),
    )
    if key not in _verdicts:
        try:
            with packed_attention(model):
                _verdicts[key] = find_leak(model, start)
        except ValueError as error:
            logger.warning(f"fastft: packing is not checked: {error}")
            return None
    return _verdicts[key]
