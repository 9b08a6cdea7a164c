"""Packed batches for the engines of `packed_boundaries`: lengths, ignored labels, and a run into
new outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
# lengths of segments; some are empty, some batches have no token at all
LENGTHS = {
    "one token": [1],
    "ones": [1] * 63,
    "empty segments": [0, 3, 0, 0, 5, 0],
    "no tokens": [0, 0],
    "odd": [63, 1, 507],
    "long": [3000, 1, 2048],
    "many": [segment % 4 for segment in range(1, 1500)],
}


def draw(lengths: list[int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """lengths, ignored and source; one segment in three has no ignored label, one ignores all."""
    ignored = [min(n, (0, 1, n)[s % 3]) for s, n in enumerate(lengths)]
    tensors = [torch.tensor(numbers, dtype=torch.int64) for numbers in (lengths, ignored)]
    source = torch.randint(0, 50_000, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return tensors[0].to(device), tensors[1].to(device), source.to(device)


def run(
    fill: Callable[..., Any],
    lengths: Tensor,
    ignored: Tensor,
    source: Tensor,
    start: int = 0,
    in_place: bool = False,
) -> dict[str, Tensor]:
    """What `fill` writes, into outputs that hold nonsense before."""
    source = source.clone()
    out = {
        "labels": source if in_place else torch.full_like(source, 77),
        "position_ids": torch.full_like(source, 77),
        "seq_idx": torch.full_like(source, 77, dtype=torch.int32),
        "cu_seqlens": torch.full(
            (lengths.numel() + 1,), 77, dtype=torch.int32, device=source.device
        ),
    }
    fill(lengths, ignored, source, start, *out.values())
    return out


def expected(lengths: Tensor, ignored: Tensor, source: Tensor, start: int = 0) -> dict[str, Tensor]:
    """The same, by counting in Python."""
    labels, positions, segments, borders = [], [], [], [0]
    tokens = iter(source.tolist())
    for segment, (length, unlabelled) in enumerate(
        zip(lengths.tolist(), ignored.tolist(), strict=True)
    ):
        for offset in range(length):
            token = next(tokens)
            labels.append(IGNORED if offset < unlabelled else token)
            positions.append(start + offset)
            segments.append(segment)
        borders.append(borders[-1] + length)
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "position_ids": torch.tensor(positions, dtype=torch.int64),
        "seq_idx": torch.tensor(segments, dtype=torch.int32),
        "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
    }


def check(
    fill: Callable[..., Any], lengths: list[int], start: int, in_place: bool, device: str = "cpu"
) -> None:
    """Raises unless `fill` writes what counting gives."""
    problem = draw(lengths, device)
    ours, counted = run(fill, *problem, start, in_place), expected(*problem, start)
    assert ours.keys() == counted.keys()
    for name, value in counted.items():
        assert torch.equal(ours[name].cpu(), value), name
