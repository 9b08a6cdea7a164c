"""The cases, and for each a small model and a batch."""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from fastft.loss.lazy.output_head import find_heads
from support.architectures.inputs import EXTRA_INPUTS
from support.architectures.overrides import OVERRIDES
from support.architectures.shrink import VOCABULARY, shrink

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
BATCH, LENGTH = 2, 32
MOST_PARAMETERS = 60_000_000


@dataclass(frozen=True, order=True)
class Case:
    """One class in one of transformers' mappings."""

    mapping: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.mapping}-{self.model_type}-{self.class_name}"


def all_cases() -> list[Case]:
    """What transformers lists."""
    return [
        Case(mapping, model_type, name)
        for mapping, listed in MAPPINGS.items()
        for model_type, names in listed.items()
        for name in (names if isinstance(names, tuple | list) else (names,))
    ]


def seed(number: int) -> None:
    """All three generators that models draw from."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def build(case: Case) -> nn.Module:
    """The model in training mode, its head's weight scaled up so that a wrong loss differs much.

    Biases and gates begin at zero, which hides what they multiply: here they do not.
    """
    config = small_config(case)
    kind = getattr(transformers, case.class_name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(config).parameters())
    if count > MOST_PARAMETERS:
        raise RuntimeError(f"still {count / 1e6:.0f} million parameters when shrunk")
    seed(0)
    model = kind(config).float().train()
    with torch.no_grad():
        for weight in {id(head.weight): head.weight for head in find_heads(model)}.values():
            weight.mul_(8.0)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def small_config(case: Case) -> Any:
    kind = getattr(transformers, case.class_name)
    overrides = OVERRIDES.get((case.mapping, case.model_type), OVERRIDES.get(case.model_type, {}))
    whole = transformers.CONFIG_MAPPING[case.model_type]()
    config = _part_for(kind, whole)
    overrides = overrides if config is whole else overrides.get("text_config", overrides)
    config = type(config)(**shrink(config.to_dict(), overrides))
    if case.mapping == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if getattr(config, "is_encoder_decoder", False):
        for name in ("decoder_start_token_id", "pad_token_id"):
            if getattr(config, name, None) is None:
                setattr(config, name, 0)
    return config


def _part_for(kind: Any, config: Any) -> Any:
    """The part of a composite config that the class is made of."""
    if isinstance(config, kind.config_class):
        return config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return next((part for part in parts if isinstance(part, kind.config_class)), config)


def batch(case: Case, model: nn.Module) -> dict[str, Any]:
    """Tokens and labels, some ignored, and what else this model's forward asks for."""
    sizes = [
        getattr(part, "vocab_size", None) for part in (model.config, model.config.get_text_config())
    ]
    vocabulary = min(size for size in (*sizes, VOCABULARY) if size)
    seed(3)
    ids = torch.randint(5, vocabulary - 6, (BATCH, LENGTH))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": _labels(case, model, ids),
    }
    inputs |= EXTRA_INPUTS.get(case.class_name, lambda config, ids: {})(model.config, ids)
    accepted = inspect.signature(model.forward).parameters
    if not takes_any(model):
        inputs = {name: value for name, value in inputs.items() if name in accepted}
    return inputs


def _labels(case: Case, model: nn.Module, ids: Tensor) -> Tensor:
    if case.mapping == "masked":
        # a model with tied embeddings knows its own input by heart
        other = ids[torch.randperm(BATCH)].roll(5, 1)
        return other.masked_fill(torch.rand(ids.shape) >= 0.3, -100)
    labels = ids.masked_fill(torch.arange(LENGTH) < 3, -100)
    encoder_decoder = case.mapping == "seq2seq" and getattr(
        model.config, "is_encoder_decoder", False
    )
    return labels[:, :20].contiguous() if encoder_decoder else labels


def takes_any(model: nn.Module) -> bool:
    """Whether forward has **kwargs: Trainer then passes num_items_in_batch."""
    return any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()
    )
