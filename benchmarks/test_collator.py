"""Collating 64 examples of about 600 tokens against transformers' flattening collator, from each kind of input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compare import compare

from fastft.data.collator import PackingCollator

FORMS = {"list": np.ndarray.tolist, "numpy": np.copy, "torch": torch.tensor}


def make(form: str, labels: bool) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    ids = [random.integers(0, 50_000, size) for size in random.integers(200, 1000, 64)]
    return [{key: FORMS[form](one) for key in ("input_ids", "labels")[: 1 + labels]} for one in ids]


@pytest.mark.parametrize("labels", [False, True], ids=["ids", "ids_and_labels"])
@pytest.mark.parametrize("form", FORMS)
def test_collate(benchmark, form, labels):
    transformers = pytest.importorskip("transformers")
    examples = make(form, labels)
    flattening = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    collator = PackingCollator()
    tokens = collator(examples)["input_ids"].numel()
    benchmark.extra_info["tokens"] = tokens
    written = [torch.zeros(tokens, dtype=torch.int64) for _ in range(3)] + [torch.zeros(tokens, dtype=torch.int32)]
    compare(
        benchmark,
        lambda: collator(examples),
        {"transformers flattening": lambda: flattening(examples)},
        rounds=31,
        # read: the examples; written: input_ids, labels, position_ids, seq_idx
        bytes_moved=tokens * (8 * (1 + labels) + 28),
        limit=lambda: [tensor.clone() for tensor in written],
    )
