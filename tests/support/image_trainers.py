"""Trainers of small models for images and text, and a collator that pads as processors do."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from fastft.data.keys import is_of_images
from support.architectures.images import Example, model_and_examples
from support.architectures.models import Case
from support.trainers import quiet_arguments

QWEN = Case("image-text", "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
GEMMA = Case("image-text", "gemma3", "Gemma3ForConditionalGeneration")
LLAVA = Case("image-text", "llava", "LlavaForConditionalGeneration")


class Padded:
    """Pads tokens on a side, and joins images."""

    def __init__(self, side: str = "right") -> None:
        self.side = side

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        longest = max(example["input_ids"].shape[1] for example in examples)
        batch = {}
        for key in examples[0]:
            values = [example[key] for example in examples]
            if not is_of_images(key):
                fill = -100 if key == "labels" else 0
                values = [self._filled(value, longest, fill) for value in values]
            batch[key] = torch.cat(values)
        return batch

    def _filled(self, value: torch.Tensor, longest: int, fill: int) -> torch.Tensor:
        padding = value.new_full((1, longest - value.shape[1]), fill)
        parts = [value, padding] if self.side == "right" else [padding, value]
        return torch.cat(parts, 1)


def image_trainer(folder: Any, case: Case, collator: Any = None, **changes: Any) -> Trainer:
    """A Trainer of a fresh model on eight examples, four in a batch; `collator` of the model, if
    not `Padded`."""
    model, examples = model_and_examples(case, 8)
    callbacks = changes.pop("callbacks", None)
    dataset = changes.pop("dataset", lambda examples: examples)(examples)
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    arguments = quiet_arguments(folder, **{**settings, **changes})
    collator = Padded() if collator is None else collator(model)
    return Trainer(model, arguments, collator, dataset, callbacks=callbacks)
