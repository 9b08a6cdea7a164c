"""Positions, segments, boundaries and labels of a packed batch on this machine's device, by each
engine.

On a GPU a batch is moved there as well: flat, in one copy, against all of its tensors.
"""

from __future__ import annotations

import pytest
import torch
from compare import DEVICE, compare

from fastft.data.boundaries import BOUNDARIES, boundaries_reference
from fastft.data.collator import PackingCollator

ENGINES = [
    name
    for name in BOUNDARIES.engines
    if BOUNDARIES.unavailable(name, torch.device(DEVICE, 0)) is None
]


@pytest.mark.parametrize("tokens", [8192, 262_144])
@pytest.mark.parametrize("engine", ENGINES)
def test_packed_boundaries(benchmark, engine, tokens):
    segments = tokens // 512
    lengths = torch.full((segments,), 512, device=DEVICE)
    ignored, source = (
        torch.ones_like(lengths),
        torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
    )
    outputs = [
        torch.empty_like(source),
        torch.empty_like(source),
        torch.empty_like(source, dtype=torch.int32),
    ]
    outputs.append(torch.empty(segments + 1, dtype=torch.int32, device=DEVICE))
    arguments = (lengths, ignored, source, 0, *outputs)
    fill = BOUNDARIES.implementation(engine, source.device)

    def same():
        fill(*arguments)
        ours = [tensor.clone() for tensor in outputs]
        boundaries_reference(*arguments)
        assert all(map(torch.equal, ours, outputs))

    compare(
        benchmark,
        lambda: fill(*arguments),
        {"plain torch": lambda: boundaries_reference(*arguments)},
        check=same,
        bytes_moved=28 * tokens,
        bare=lambda: [tensor.clone() for tensor in outputs],
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU to move a batch to")
def test_batch_to_gpu(benchmark):
    examples = [{"input_ids": torch.arange(512), "labels": torch.arange(512)} for _ in range(64)]
    whole = PackingCollator()(examples)
    pinned = {
        key: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for key, value in whole.items()
    }
    batch, flat = type(whole)(pinned), PackingCollator(expand_on_device=True)(examples).pin_memory()

    def same():
        ours, theirs = flat.to(DEVICE), batch.to(DEVICE)
        assert all(torch.equal(ours[key], theirs[key]) for key in ("input_ids", "labels"))

    compare(
        benchmark,
        lambda: flat.to(DEVICE, non_blocking=True),
        {"every tensor": lambda: batch.to(DEVICE, non_blocking=True)},
        check=same,
        bare=lambda: flat.integers.to(DEVICE, non_blocking=True),
    )
