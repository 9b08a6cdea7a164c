"""Trainer takes a row of a batch for one example: what goes wrong where a row holds several.

Generation, gathering of predictions, labels of whole examples, smoothed labels of first tokens and
counts of tokens are refused, or a warning says what they will be.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from fastft.data.collator import PackingCollator
from fastft.data.keys import IGNORE_INDEX, LABEL_SEGMENTS
from fastft.data.packed import packs_of
from fastft.data.processed import tensor_of
from fastft.data.tasks.image_text import IMAGE_TEXT
from fastft.foreign.models import base_model
from fastft.integrations.pool_segments import is_pooled
from fastft.integrations.probe.images import examples_in

CAUSAL = ("causal_lm", IMAGE_TEXT)

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

A_ROW_FOR_EACH = (
    "PackingCollator(pad_examples=True) with train_dataset=fastft.pack(...) and eval_dataset the "
    "dataset itself"
)


def refuse_generation(args: TrainingArguments, collator: PackingCollator) -> None:
    """Raises ValueError where Trainer would generate from rows that hold several examples."""
    if getattr(args, "predict_with_generate", False) and not collator.pad_examples:
        if collator.task == "speech_seq2seq":
            raise ValueError(
                "fastft: predict_with_generate=True would generate from packed batches; give the "
                "Trainer your padding collator, and fastft.plug(trainer, packing='collate'), which "
                "packs in training alone"
            )
        raise ValueError(
            "fastft: predict_with_generate=True would generate one text for a row of several "
            f"examples; use {A_ROW_FOR_EACH}, which then has a row for each example, or leave "
            "predict_with_generate out"
        )


def warn_of_repeats(args: TrainingArguments, loader: Any, collator: PackingCollator) -> bool:
    """Warns, and says whether it did, where predictions of repeated examples would stay.

    accelerate gives some examples out twice, so that all ranks have equally many, and takes their
    predictions away again by counting rows. Rows of several examples it cannot count.
    """
    if (
        args.world_size <= 1
        or args.prediction_loss_only
        or collator.task == "sequence_classification"  # pool_segments refuses these
        or collator.rows >= args.per_device_eval_batch_size
        or collator.pad_examples
    ):
        return False
    try:
        repeated = -len(loader.dataset) % (args.per_device_eval_batch_size * args.world_size)
    except TypeError:  # an iterable dataset has no length
        return False
    if repeated:
        logger.warning(
            f"fastft: this evaluation has {repeated} examples (or packs) twice, so that ranks have "
            "equally many. The loss leaves them out; predictions, and metrics computed from them, "
            f"do not, as rows hold several examples. For a row each: {A_ROW_FOR_EACH}; or "
            "rows=per_device_eval_batch_size"
        )
    return bool(repeated)


def labels_meet_rows(model: nn.Module, loader: Any, collator: PackingCollator) -> bool:
    """Whether labels of examples would meet logits of rows: torch broadcasts the two in a
    regression."""
    if collator.task != "sequence_classification" or is_pooled(model):
        return False
    padded = collator.pad_examples and packs_of(loader) is None
    signature = inspect.signature(base_model(model).forward)
    return not padded and LABEL_SEGMENTS not in signature.parameters


def refuse_logits_of_rows(model: nn.Module, loader: Any, collator: PackingCollator) -> None:
    """Raises ValueError where labels of examples would meet logits of rows."""
    if labels_meet_rows(model, loader, collator):
        raise ValueError(
            f"{type(base_model(model)).__name__} makes one row of logits of a row of several "
            "examples: call fastft.pool_segments(model), which makes one of each example, before "
            "the model is sharded, and before an evaluation outside of a training"
        )


def smooths_labels_unshifted(args: Any, model: nn.Module) -> bool:
    """Whether Trainer's label smoother takes the labels of a causal model as they are: it shifts
    those of the classes for causal models, of which none reads images."""
    name = type(base_model(model)).__name__
    smoothed = getattr(args, "label_smoothing_factor", 0.0) != 0
    return smoothed and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def first_labels_are_smoothed(model: nn.Module) -> str:
    """A sentence for a model of which that is so, and whose examples learn their first token."""
    return (
        "with label_smoothing_factor Trainer does not shift the labels of "
        f"{type(base_model(model)).__name__}, and the first token of each text is learned too, "
        "which packed batches leave out; label_smoothing_factor=0 has the model's own loss"
    )


def learns_first_tokens(loader: Any, collator: PackingCollator, model: nn.Module) -> bool:
    """Whether some example from all over a loader's dataset has a label for its first token, as far
    as that can be known."""
    examples = examples_in(loader, collator, model)
    return examples is None or any(map(_learns_its_first, examples))


def _learns_its_first(example: dict[str, Any]) -> bool:
    labels = example.get("labels")
    if labels is None:  # all of its tokens are
        return True
    labels, mask = tensor_of(labels).flatten(), example.get("attention_mask")
    first = 0 if mask is None else int(tensor_of(mask).flatten().argmax())
    return len(labels) > 0 and int(labels[first]) != IGNORE_INDEX


def say_what_trainer_counts(args: Any, collator: PackingCollator, processing_class: Any) -> None:
    """Trainer knows padding by the attention mask, which a packed batch has not, or by the padding
    token."""
    if getattr(args, "include_num_input_tokens_seen", "no") != "non_padding":
        return
    pad = getattr(processing_class, "pad_token_id", None)
    pads = collator.rows > 1 or collator.pad_to_multiple_of is not None
    if pads and collator.pad_token_id != pad:
        logger.warning(
            "fastft: num_input_tokens_seen will count padding: Trainer leaves out the padding "
            f"token of processing_class, {pad}, that of PackingCollator is "
            f"{collator.pad_token_id}; give it pad_token_id={pad}"
        )
    elif pad is not None and pad == getattr(processing_class, "eos_token_id", None):
        logger.warning(
            "fastft: num_input_tokens_seen will leave out every end token: Trainer takes the "
            f"padding token of processing_class, {pad}, for padding. Without padding in the rows, "
            "'all' counts right"
        )
