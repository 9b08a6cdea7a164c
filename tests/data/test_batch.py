"""How a packed batch reaches its device: whole, or as one buffer that is unpacked there; in workers
and in Trainer."""

from __future__ import annotations

import pickle

import pytest
import torch
from support.packed_examples import assert_same, make
from support.ptx.engines import Engine, operator
from support.trainers import logged, quiet_arguments, tiny_llama
from torch.utils.data import DataLoader
from transformers import Trainer

from fastft.data.batch import FlatBatch, PackedBatch
from fastft.data.boundaries import BOUNDARIES
from fastft.data.collator import PackingCollator

OPTIONS = {
    "labels follow from the tokens": ({}, {}),
    "labels": ({}, {"labels": 30}),
    "other keys": (
        {"pad_to_multiple_of": 7, "position_ids_start": 2},
        {"labels": 30, "token_type_ids": 0},
    ),
    "rows": ({"rows": 2, "pad_to_multiple_of": 8}, {"labels": 30}),
    "token_classification": ({"task": "token_classification"}, {"labels": 30}),
    "no labels": ({"task": "token_classification"}, {}),
    "sequence_classification": ({"task": "sequence_classification", "rows": 2}, {}),
    "seq2seq": ({"task": "seq2seq", "decoder_start_token_id": 0}, {"labels": 30}),
}


def examples_for(name):
    options, others = OPTIONS[name]
    examples = make([3, 5, 1, 63], **others)
    for index, example in enumerate(examples):
        example["weights"] = [0.5] * len(example["input_ids"])
        if options.get("task") == "sequence_classification":
            example["label"] = index
    return examples, options


@pytest.mark.parametrize("name", OPTIONS)
def test_expanded_on_its_device_it_is_the_same_batch(name):
    examples, options = examples_for(name)
    whole = PackingCollator(**options)(examples)
    flat = PackingCollator(**options, expand_on_device=True)(examples)
    for one in (flat, pickle.loads(pickle.dumps(flat))):
        batch = one.to("cpu")
        assert_same(batch, whole)
        assert isinstance(batch, PackedBatch) and batch.counted == whole.counted


def test_a_flat_batch_can_be_moved_again():
    flat = PackingCollator(expand_on_device=True)(make([3, 2]))
    first = flat.to("cpu")
    first["input_ids"].zero_()
    assert flat.to("cpu")["input_ids"].tolist() == [[0, 1, 2, 9, 10]]


def test_one_copy_for_all_integers(monkeypatch):
    examples = make([3, 5], labels=30, token_type_ids=0)
    flat, moved, stock = PackingCollator(expand_on_device=True)(examples), [], torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *args, **kwargs: moved.append(self) or stock(self, *args, **kwargs),
    )
    flat.to("cpu", non_blocking=True)
    assert [tensor.numel() for tensor in moved] == [3 * 8 + 2 * 2]


def test_pinned(monkeypatch):
    """As DataLoader(pin_memory=True) asks; pinning needs a GPU, copying stands for it here."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    examples, options = examples_for("other keys")
    flat = PackingCollator(**options, expand_on_device=True)(examples)
    pinned = torch.utils.data._utils.pin_memory.pin_memory(flat)
    assert isinstance(pinned, FlatBatch) and pinned.integers is not flat.integers
    assert_same(pinned.to("cpu"), flat.to("cpu"))
    assert pinned.counted == flat.counted == PackingCollator(**options)(examples).counted


def test_the_cuda_kernel_expands_it(monkeypatch):
    for name in OPTIONS:
        examples, options = examples_for(name)
        expected = PackingCollator(**options)(examples)
        flat = PackingCollator(**options, expand_on_device=True, impl="eager")(examples)
        with (
            operator(Engine("cuda", 90), "packed_boundaries") as (fill, launches),
            monkeypatch.context() as patch,
        ):
            patch.setattr(BOUNDARIES, "reference", fill.default)
            assert_same(flat.to("cpu"), expected)
        assert launches


def test_the_count_stays_with_the_batch():
    batch = PackingCollator()(make([3, 2], labels=30))
    assert batch.counted == 3 and batch.to("cpu").counted == 3
    batch["labels"][0, 1] = -100
    assert batch.counted == 2
    assert PackedBatch(batch).counted is None
    moved = batch.to("cpu")
    assert moved["cu_seq_lens_q"] is moved["cu_seq_lens_k"] and type(moved) is PackedBatch


@pytest.mark.parametrize("expand_on_device", [False, True])
def test_workers(expand_on_device):
    examples = make([3, 5, 1, 7])
    collator = PackingCollator(expand_on_device=expand_on_device)
    loader = DataLoader(examples, batch_size=2, collate_fn=collator, num_workers=1)
    batches = [batch.to("cpu") for batch in loader]
    for batch, features in zip(batches, (examples[:2], examples[2:]), strict=True):
        expected = PackingCollator()(features)
        assert_same(batch, expected)
        assert batch.counted == expected.counted


def losses(tmp_path, workers=0, **options):
    data = make([4, 7, 5, 9, 3, 6, 8, 5], labels=20)
    arguments = quiet_arguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=3,
    )
    collator = PackingCollator(**options)
    trainer = Trainer(tiny_llama(100), arguments, collator, data, data[:3])
    trainer.train()
    return logged(trainer, "loss", "eval_loss")


def test_trainer_takes_flat_batches(tmp_path):
    plain = losses(tmp_path)
    assert len(plain) == 4
    for options in ({}, {"workers": 2}):
        assert losses(tmp_path, expand_on_device=True, **options) == plain
