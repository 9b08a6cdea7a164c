"""Examples of given sizes in every form that the collator takes, and the comparison of two
batches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

FORMS = {
    "list": lambda values: list(values),
    "tuple": lambda values: tuple(values),
    "numpy": lambda values: np.array(values, np.int64),
    "numpy int32": lambda values: np.array(values, np.int32),
    "numpy strided": lambda values: np.repeat(np.array(values), 2)[::2],
    "torch": lambda values: torch.tensor(values),
    "torch int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "torch strided": lambda values: torch.tensor(values).repeat_interleave(2)[::2],
}


def make(sizes: list[int], form: str = "list", **others: int) -> list[dict[str, Any]]:
    """Examples of the given sizes; `others` are further keys and the first of their values."""
    made = FORMS[form]
    return [
        {
            "input_ids": made(range(9 * i, 9 * i + n)),
            **{key: made(range(v, v + n)) for key, v in others.items()},
        }
        for i, n in enumerate(sizes)
    ]


def parts_of_example(length: int, max_tokens: int, overlong: str) -> list[tuple[int, int]]:
    """First token and tokens of each part of an example that packs of `max_tokens` are to have."""
    if overlong == "drop" and length > max_tokens:
        return []
    kept = min(length, max_tokens) if overlong == "truncate" else length
    return [(first, min(max_tokens, kept - first)) for first in range(0, kept, max_tokens)]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises unless both have the same keys, and equal values of the same types."""
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                ours[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}"
            )
        else:
            assert ours[key] == value and type(ours[key]) is type(value)


def unpacked(batch: dict[str, Any], key: str, boundaries: str = "cu_seq_lens_q") -> list[list[int]]:
    """The values of a key by segment."""
    flat, bounds = batch[key].flatten().tolist(), batch[boundaries].tolist()
    return [flat[begin:end] for begin, end in itertools.pairwise(bounds)]
