"""Logits for the tokens alone whose successor has a label, which causal models of transformers
compute where a batch asks for them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastft.data.keys import IGNORE_INDEX, LOGITS_TO_KEEP, SHIFT_LABELS
from fastft.foreign import base_model


def check_supervised(model: Any, task: str, expand_on_device: bool) -> None:
    """Raises ValueError where a mask of the logits to keep could not be made, or would not be
    understood.

    Args:
        model: which the batches are for, or just True.
        task: of the collator.
        expand_on_device: of the collator.
    """
    if expand_on_device:
        raise ValueError(
            "supervised_only does not go with expand_on_device, as labels are chosen on the host"
        )
    if task != "causal_lm":
        raise ValueError(f"supervised_only does not go with task {task!r}")
    if model is not True and not isinstance(model, torch.nn.Module):
        raise ValueError(f"supervised_only must be True, False or a model, got {model!r}")

    import transformers

    if not hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
        raise ValueError(
            f"supervised_only needs transformers >= 5.23, {transformers.__version__} is installed"
        )
    if model is True:
        return
    base = base_model(model)
    if "slice_logits_to_keep" not in inspect.unwrap(type(base).forward).__code__.co_names:
        raise ValueError(
            f"supervised_only: {type(base).__name__} does not use transformers' "
            f"slice_logits_to_keep"
        )


def kept_logits(labels: Tensor) -> dict[str, Tensor]:
    """Which tokens of `labels`, (R, T), need logits, bool (R, T), and the labels of these, (K,)."""
    following = torch.full_like(labels, IGNORE_INDEX)
    # the last token of a row is followed by an ignored one: the first of the next
    following.view(-1)[:-1] = labels.view(-1)[1:]
    keep = following != IGNORE_INDEX
    return {LOGITS_TO_KEEP: keep, SHIFT_LABELS: following[keep]}
