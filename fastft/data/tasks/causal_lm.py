"""Causal language modelling, with logits for all tokens or for those with a label alone.

A model that shifts the labels itself predicts each token from the ones before. Of the supervised
tokens alone, those whose successor has a label, causal models of transformers compute logits where
a batch says which these are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastft.data.keys import IGNORE_INDEX, LOGITS_TO_KEEP, SHIFT_LABELS
from fastft.data.tasks.task import Task
from fastft.foreign.models import base_model


class CausalLM(Task):
    """The next token as the label, by the model's own shift: an example's first one is nobody's."""

    sources: tuple[str, ...] = ("labels", "input_ids")
    ignored = 1


def check_supervised(model: Any, task: str, expand_on_device: bool) -> None:
    """Raises ValueError where a mask of logits cannot be made, or would not be understood.

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
            "slice_logits_to_keep"
        )


def kept_logits(labels: Tensor) -> dict[str, Tensor]:
    """Marks the tokens of `labels`, (R, T), that need logits; with the labels of these, (K,)."""
    following = torch.full_like(labels, IGNORE_INDEX)
    # the last token of a row is followed by an ignored one: the first of the next
    following.view(-1)[:-1] = labels.view(-1)[1:]
    keep = following != IGNORE_INDEX
    return {LOGITS_TO_KEEP: keep, SHIFT_LABELS: following[keep]}
