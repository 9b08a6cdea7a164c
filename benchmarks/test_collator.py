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
import texts
import torch
from compare import compare, rival

import fastft
from fastft.data.collator import PackingCollator

transformers = pytest.importorskip("transformers")

FORMS = {"list": np.ndarray.tolist, "numpy": np.copy, "torch": torch.tensor}
COUNT, WORDS = 64, 50_000
Collate = Callable[[list[dict[str, Any]]], Any]


def drawn(real: bool = False) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = random.choice(texts.lengths(), COUNT) if real else random.integers(200, 1000, COUNT)
    return [random.integers(5, WORDS, size) for size in sizes]


def make(form: str, *keys: str, real: bool = False) -> list[dict[str, Any]]:
    return [{key: FORMS[form](one) for key in keys} for one in drawn(real)]


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
    check: Callable[[Any], None],
) -> None:
    """`check` is called with a batch of ours; `columns`: how many are read."""
    batch = ours()
    tokens = batch["input_ids"].numel()
    benchmark.extra_info["tokens"] = tokens
    kept = [batch[key] for key in ("input_ids", "labels", "position_ids", "seq_idx")]
    compare(
        benchmark,
        ours,
        theirs,
        check=lambda: check(batch),
        bytes_moved=8 * columns * tokens + sum(tensor.nbytes for tensor in kept),
        bare=lambda: [tensor.clone() for tensor in kept],
    )


def as_flattened(examples: list[dict[str, Any]]) -> Callable[[Any], None]:
    """The check of a batch: it is transformers' to the last number."""

    def check(batch: Any) -> None:
        stock = flattening()(examples)
        for key in ("input_ids", "labels", "position_ids", "seq_idx"):
            assert torch.equal(batch[key], stock[key]), key

    return check


@pytest.mark.parametrize("labels", [False, True], ids=["ids", "ids_and_labels"])
@pytest.mark.parametrize("form", FORMS)
def test_collate(benchmark, form, labels):
    collate(benchmark, form, ("input_ids", "labels")[: 1 + labels])


@pytest.mark.parametrize("form", ["list", "numpy"])
def test_collate_texts(benchmark, form):
    """As long as 64 texts drawn of texts.py: most are short, a few very long."""
    collate(benchmark, form, ("input_ids", "labels"), real=True)


def collate(benchmark: Any, form: str, keys: tuple[str, ...], real: bool = False) -> None:
    examples, collator = make(form, *keys, real=real), PackingCollator()
    lists, labels = make("list", *keys, real=real), "labels" in keys
    theirs = {name: lambda other=other: other(examples) for name, other in rivals(labels).items()}
    if form != "list":  # what a user of the rival would give it
        flatten = flattening()
        theirs["transformers flattening, from lists"] = lambda: flatten(lists)
    if "transformers padding" in theirs:  # it changes what it is given
        padding = rivals(True)["transformers padding"]
        theirs["transformers padding"] = lambda: padding([dict(example) for example in lists])
    measure(benchmark, lambda: collator(examples), theirs, len(keys), as_flattened(lists))


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
        as_flattened(dataset.__getitems__(rows)),
    )


@pytest.mark.parametrize("task", ["masked_lm", "rows"])
def test_collate_tasks(benchmark, task):
    """Masks as transformers draws them for padded batches; four rows in place of one."""
    masked = task == "masked_lm"
    examples = make("list", "input_ids", *(["special_tokens_mask"] if masked else []))
    for example in examples if masked else ():
        example["special_tokens_mask"] = [0] * len(example["input_ids"])
    tokens = torch.cat([torch.tensor(example["input_ids"]) for example in examples])
    if masked:
        words = tokenizer()
        words.__class__ = type("Words", (type(words),), {"__len__": lambda self: WORDS})
        collator = PackingCollator(task="masked_lm", tokenizer=words)
        masking = transformers.DataCollatorForLanguageModeling(words)
        theirs = {
            "transformers padding, masked": lambda: masking([dict(example) for example in examples])
        }
    else:
        collator, flatten = PackingCollator(rows=4), flattening()
        theirs = {"transformers flattening": lambda: flatten(examples)}

    def check(batch: Any) -> None:
        ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        if masked:
            assert torch.equal(torch.where(labels == -100, ids, labels), tokens)
        else:
            assert torch.equal(ids[ids >= 5].sort().values, tokens.sort().values)

    measure(benchmark, lambda: collator(examples), theirs, 1 + masked, check)
