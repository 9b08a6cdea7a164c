"""A dataset that is changed when it is packed already: what fits the plan is read as it is now,
what does not raises. No example comes twice, none is lost without a word."""

from __future__ import annotations

import pytest
import torch
from support.plugged import examples, trainer_of
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import fastft

CHANGES = {
    "more examples": (
        lambda rows: rows.append({"input_ids": [7]}),
        "has 17 examples, but had 16",
    ),
    "fewer examples": (lambda rows: rows.pop(), "has 15 examples, but had 16"),
    "more tokens": (
        lambda rows: rows[3]["input_ids"].append(9),
        r"example 3 has 6 tokens, but had 5",
    ),
    "fewer tokens": (
        lambda rows: rows[3]["input_ids"].pop(),
        r"example 3 has 4 tokens, but had 5",
    ),
    "another order": (lambda rows: rows.sort(key=lambda row: len(row["input_ids"])), "has .* but"),
    "a column more": (lambda rows: rows[3].update(labels=[1] * 5), "has the keys"),
}


def tokens_of(packs) -> list[list[int]]:
    loader = DataLoader(packs, batch_size=2, collate_fn=lambda batch: batch)
    found = [pack.examples for batch in loader for pack in batch]
    return sorted(example["input_ids"] for pack in found for example in pack)


def given(rows) -> list[list[int]]:
    return sorted(row["input_ids"] for row in rows)


@pytest.mark.parametrize("seed", [None, 3], ids=["same order", "order of the epoch"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_the_plan_raises(change, seed):
    rows = examples()
    packs = fastft.pack(rows, 24, seed=seed)
    assert tokens_of(packs) == given(rows)
    CHANGES[change][0](rows)
    packs.set_epoch(1)
    with pytest.raises(ValueError, match=CHANGES[change][1]):
        tokens_of(packs)
    packs = fastft.pack(rows, 24, seed=seed)
    if change != "a column more":
        assert tokens_of(packs) == given(rows)


@pytest.mark.parametrize("tokens", [8, 16, 9])
@pytest.mark.parametrize("more", [-1, 1, 8])
def test_what_is_split_must_keep_its_length(tokens, more):
    """Also where the last piece is a full pack, as one would be that is cut off."""
    rows = [{"input_ids": [3] * 5}, {"input_ids": [4] * tokens}]
    packs = fastft.pack(rows, 8, overlong="split")
    rows[1]["input_ids"] = [4] * (tokens + more)
    with pytest.raises(
        ValueError, match=f"example 1 has {tokens + more} tokens, but had {tokens} "
    ):
        list(packs)


def test_what_is_truncated_may_grow():
    rows = [{"input_ids": [3] * 5}, {"input_ids": [4] * 8}]
    packs = fastft.pack(rows, 8, overlong="truncate")
    rows[1]["input_ids"] = [4] * 11
    assert tokens_of(packs) == [[3] * 5, [4] * 8]


def test_other_tokens_of_the_same_lengths_are_those_of_the_next_epoch():
    rows = examples()
    packs = fastft.pack(rows, 24, seed=3)
    before = tokens_of(packs)
    for row in rows:
        row["input_ids"] = row["input_ids"][::-1]
    packs.set_epoch(1)
    assert tokens_of(packs) == given(rows) != before


class _Grows(TrainerCallback):
    def __init__(self, rows):
        self.rows = rows

    def on_epoch_end(self, args, state, control, **kwargs):
        self.rows.append({"input_ids": [5, 6, 7]})


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_ends_with_that_sentence(tmp_path, workers):
    rows = examples()
    trainer = trainer_of(
        tmp_path,
        options={"train_dataset": rows, "callbacks": [_Grows(rows)]},
        max_steps=-1,
        num_train_epochs=2,
        dataloader_num_workers=workers,
    )
    fastft.plug(trainer, packing=40)
    with pytest.raises(ValueError, match="has 17 examples, but had 16"):
        trainer.train()
    assert trainer.state.epoch == 1


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_is_read_as_it_comes_in_each_epoch():
    rows = examples()
    packs = fastft.pack(_Stream(rows), 24)
    for change in (lambda: None, lambda: rows.append({"input_ids": [7]}), rows.pop):
        change()
        assert tokens_of(packs) == given(rows)
