"""Parts of an example: some of its tokens, with everything that has one value per token."""

from __future__ import annotations

from typing import Any

import torch

from fastft.data.boundaries import IGNORE_INDEX
from fastft.data.documents import KEYS, is_per_token, shortened


def cut(example: dict[str, Any], start: int, length: int) -> dict[str, Any]:
    """`length` tokens of an example from `start`; a key that has another number of values than
    tokens is kept whole.

    Of a row that another tool packed the part has its share of each document.
    """
    tokens = len(example["input_ids"])
    if start == 0 and tokens == length:
        return example
    rewritten = shortened(example, start, length) if example.keys() & KEYS else {}
    return {
        key: rewritten[key]
        if key in rewritten
        else value[start : start + length]
        if is_per_token(value, tokens)
        else value
        for key, value in example.items()
    }


def filler(example: dict[str, Any]) -> dict[str, Any]:
    """What stands in an empty pack: one token of an example, with labels that are ignored.

    Raises:
        ValueError: the labels are not integers, of which none can be ignored.
    """
    part = cut(example, 0, 1)
    if "labels" not in part:
        return part  # a causal model has nothing to predict the first token from
    labels = torch.as_tensor(
        part["labels"].tolist() if hasattr(part["labels"], "tolist") else part["labels"]
    )
    if labels.is_floating_point():
        raise ValueError(
            "balance needs more packs than there are examples for, and the labels cannot be ignored"
        )
    return part | {"labels": torch.full_like(labels, IGNORE_INDEX).tolist()}
