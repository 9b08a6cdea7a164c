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


def best_fit_decreasing(
    lengths: list[int], max_tokens: int, max_sequences: int | None = None
) -> list[list[int]]:
    """The packs of the textbook, by examples: looks at every open pack for every example; among
    equals the one wins that was filled longest ago."""
    packs: list[list[int]] = []
    room: list[int] = []
    filled: list[int] = []
    for now, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [
            p
            for p in range(len(packs))
            if room[p] >= lengths[i] and (max_sequences is None or len(packs[p]) < max_sequences)
        ]
        if fits:
            p = min(fits, key=lambda p: (room[p], filled[p]))
        else:
            p = len(packs)
            packs.append([])
            room.append(max_tokens)
            filled.append(now)
        packs[p].append(i)
        room[p] -= lengths[i]
        filled[p] = now
    return packs


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
