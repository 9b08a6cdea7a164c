"""Limits of an evaluation with a `PackingCollator`: Trainer wants a row for each example.

accelerate gives some examples out twice, so that all ranks have equally many, and takes their
predictions away again by counting rows. Rows of several examples it cannot count; and `generate`
continues rows, not segments.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from fastft.data.collator import PackingCollator

logger = logging.get_logger(f"transformers.{__name__}")

PADDED = (
    "PackingCollator(pad_examples=True) with train_dataset=fastft.pack(...) and eval_dataset the "
    "dataset itself"
)


def refuse_generation(args: TrainingArguments, collator: PackingCollator) -> None:
    """Raises ValueError where Trainer would generate from rows that hold several examples."""
    if getattr(args, "predict_with_generate", False) and not collator.pad_examples:
        raise ValueError(
            "fastft: predict_with_generate=True would generate one text for a row of several "
            f"examples; use {PADDED}, which then has a row for each example, or leave "
            "predict_with_generate out"
        )


def warn_of_repeats(args: TrainingArguments, loader: Any, collator: PackingCollator) -> bool:
    """Warns, and says whether it did, where predictions of repeated examples would stay."""
    if args.world_size <= 1 or args.prediction_loss_only:
        return False
    if collator.task == "sequence_classification":  # pool_segments refuses these
        return False
    if collator.rows >= args.per_device_eval_batch_size or collator.pad_examples:
        return False
    try:
        repeated = -len(loader.dataset) % (args.per_device_eval_batch_size * args.world_size)
    except TypeError:  # an iterable dataset has no length
        return False
    if repeated:
        logger.warning(
            f"fastft: this evaluation has {repeated} examples (or packs) twice, so that ranks have "
            "equally many. The loss leaves them out; predictions, and metrics computed from them, "
            f"do not, as rows hold several examples. For a row each: {PADDED}; or "
            "rows=per_device_eval_batch_size"
        )
    return bool(repeated)
