"""Collating 64 examples of about 600 tokens, from each kind of input, against the collators of
transformers and TRL.

The rivals get the same input. Padding collators return other batches, with more tokens: they are
what a user has who does not pack. From Arrow the time is that of fetching the rows too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compare import compare, rival

import fastft
from fastft.data.collator import PackingCollator

transformers = pytest.importorskip("transformers")

FORMS = {"list": np.ndarray.tolist, "numpy": np.copy, "torch": torch.tensor}
COUNT, WORDS = 64, 50_000
Collate = Callable[[list[dict[str, Any]]], Any]


def drawn() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(5, WORDS, size) for size in random.integers(200, 1000, COUNT)]


def make(form: str, *keys: str) -> list[dict[str, Any]]:
    return [{key: FORMS[form](one) for key in keys} for one in drawn()]


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "[MASK]": 1}, unk_token="[PAD]")
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", mask_token="[MASK]", padding_side="right"
    )


def flattening() -> Collate:
    return transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )


def rivals(labels: bool) -> dict[str, Collate]:
    made = {"transformers flattening": flattening()}
    trl = rival("trl.trainer.sft_trainer")
    if trl is not None:
        made["trl padding_free"] = trl.DataCollatorForLanguageModeling(
            pad_token_id=0, padding_free=True
        )
    if labels:
        made["transformers padding"] = transformers.DataCollatorForTokenClassification(tokenizer())
    return made


def measure(
    benchmark: Any,
    ours: Callable[[], Any],
    theirs: dict[str, Callable[[], Any]],
    columns: int,
    rounds: int = 31,
) -> None:
    tokens = sum(map(len, drawn()))
    benchmark.extra_info["tokens"] = tokens
    written = [torch.zeros(tokens, dtype=torch.int64) for _ in range(3)] + [
        torch.zeros(tokens, dtype=torch.int32)
    ]
    compare(
        benchmark,
        ours,
        theirs,
        rounds=rounds,
        # read: the examples; written: input_ids, labels, position_ids, seq_idx
        bytes_moved=tokens * (8 * columns + 28),
        bare=lambda: [tensor.clone() for tensor in written],
    )


@pytest.mark.parametrize("labels", [False, True], ids=["ids", "ids_and_labels"])
@pytest.mark.parametrize("form", FORMS)
def test_collate(benchmark, form, labels):
    keys = ("input_ids", "labels")[: 1 + labels]
    examples, collator = make(form, *keys), PackingCollator()
    lists = make("list", *keys)
    theirs = {name: lambda other=other: other(examples) for name, other in rivals(labels).items()}
    if form != "list":  # what a user of the rival would give it
        flatten = flattening()
        theirs["transformers flattening, from lists"] = lambda: flatten(lists)
    if "transformers padding" in theirs:  # it changes what it is given
        padding = rivals(True)["transformers padding"]
        theirs["transformers padding"] = lambda: padding([dict(example) for example in lists])
    measure(benchmark, lambda: collator(examples), theirs, 1 + labels, rounds=21)


def test_collate_from_arrow(benchmark):
    """What a DataLoader does for a batch: fetches five packs' rows of a datasets.Dataset and
    collates them."""
    datasets = pytest.importorskip("datasets")
    columns = {key: [one.tolist() for one in drawn()] * 20 for key in ("input_ids", "labels")}
    dataset, collator, other = datasets.Dataset.from_dict(columns), PackingCollator(), flattening()
    packs, batch = fastft.pack(dataset, 8192), [0, 1, 2, 3, 4]
    rows = [
        row for one in batch for row in packs.plan.indices[slice(*packs.plan.bounds(one))].tolist()
    ]
    measure(
        benchmark,
        lambda: collator(packs.__getitems__(batch)),
        {"transformers flattening": lambda: other(dataset.__getitems__(rows))},
        2,
    )


@pytest.mark.parametrize("task", ["masked_lm", "rows"])
def test_collate_tasks(benchmark, task):
    """Masks as transformers draws them for padded batches; four rows in place of one."""
    examples = make("list", "input_ids", *(["special_tokens_mask"] if task == "masked_lm" else []))
    for example in examples:
        if task == "masked_lm":
            example["special_tokens_mask"] = [0] * len(example["input_ids"])
    if task == "rows":
        collator, theirs = (
            PackingCollator(rows=4),
            {"transformers flattening": lambda: flattening()(examples)},
        )
    else:
        words = tokenizer()
        words.__class__ = type("Words", (type(words),), {"__len__": lambda self: WORDS})
        collator = PackingCollator(task="masked_lm", tokenizer=words)
        masking = transformers.DataCollatorForLanguageModeling(words)
        theirs = {
            "transformers padding, masked": lambda: masking([dict(example) for example in examples])
        }
    measure(benchmark, lambda: collator(examples), theirs, 1 + (task == "masked_lm"), rounds=9)
