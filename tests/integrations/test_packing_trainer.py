"""Trainer's arithmetic on packs: steps, epochs, counts of labels, resuming; with a tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from fastft.data.collator import PackingCollator
from fastft.data.packed import pack

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

LENGTHS = np.random.default_rng(0).integers(1, 40, 60).tolist()


def examples() -> list[dict]:
    """The first token of an example is its number; the labels of its first third are ignored."""
    made = []
    for i, length in enumerate(LENGTHS):
        ids = [i, *[90] * (length - 1)]
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


class Stream(IterableDataset):
    def __iter__(self):
        return iter(examples())


class Recorder(PackingCollator):
    """Keeps the numbers of the examples in each batch that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []

    def __call__(self, features):
        batch = super().__call__(features)
        starts = batch["cu_seq_lens_q"][:-1].long()
        self.batches.append(batch["input_ids"][0, starts].tolist())
        return batch


def make_trainer(packed, tmp_path, **options) -> transformers.Trainer:
    """A trainer with a Recorder as collator; its `counts` are the labels that each batch was told
    its step has."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    counts = []

    def compute_loss(outputs, labels, num_items_in_batch=None):
        counts.append(int(num_items_in_batch))
        return model.loss_function(
            outputs.logits, labels, vocab_size=97, num_items_in_batch=num_items_in_batch
        )

    defaults = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    args = transformers.TrainingArguments(str(tmp_path), **{**defaults, **options})
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=packed,
        data_collator=Recorder(),
        compute_loss_func=compute_loss,
    )
    trainer.counts = counts
    return trainer


@pytest.mark.parametrize("sampling", ["random", "sequential"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 3), (3, 4)])
def test_steps_epochs_and_counts(sampling, batch_size, accumulation, tmp_path):
    packed = pack(
        datasets.Dataset.from_list(examples()), 64, seed=1 if sampling == "sequential" else None
    )
    trainer = make_trainer(
        packed,
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        train_sampling_strategy=sampling,
    )
    trainer.train()
    batches = math.ceil(len(packed) / batch_size)
    steps = math.ceil(batches / accumulation)
    assert trainer.state.global_step == trainer.state.max_steps == 2 * steps
    logged = [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry]
    fractions = [min(1, (step + 1) * accumulation / batches) for step in range(steps)]
    assert logged == pytest.approx([*fractions, *(1 + fraction for fraction in fractions)])

    recorded = trainer.data_collator.batches
    epochs = [recorded[:batches], recorded[batches:]]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1]
    # the mean of a step is over the labels that have a token before them in their example
    labels = [sum(label != -100 for label in example["labels"][1:]) for example in examples()]
    per_batch = [sum(labels[i] for i in batch) for batch in recorded]
    expected = []
    for epoch in (per_batch[:batches], per_batch[batches:]):
        for first in range(0, batches, accumulation):
            step = epoch[first : first + accumulation]
            expected += [sum(step)] * len(step)
    assert trainer.counts == expected


@pytest.mark.way("resuming", packing="exact")
@pytest.mark.parametrize("sampling", ["random", "sequential"])
@pytest.mark.parametrize("step", [2, 5, 8])
def test_resuming_gives_the_same_batches(sampling, step, tmp_path):
    options = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
    }
    options |= {"save_strategy": "steps", "save_steps": step, "train_sampling_strategy": sampling}

    def run(**resume) -> transformers.Trainer:
        order = {"balance": 2, "seed": 1} if sampling == "sequential" else {}
        packed = pack(datasets.Dataset.from_list(examples()), 64, **order)
        trainer = make_trainer(packed, tmp_path, **options)
        trainer.train(**resume)
        return trainer

    whole = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    made = whole.data_collator.batches
    per_epoch = len(made) // 2
    done = (
        2 * step
        if step <= math.ceil(per_epoch / 2)
        else per_epoch + 2 * (step - math.ceil(per_epoch / 2))
    )
    assert resumed.data_collator.batches == made[min(done, len(made)) :]
    assert resumed.state.global_step == whole.state.global_step
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_max_steps(kind, tmp_path):
    dataset = datasets.Dataset.from_list(examples()) if kind == "map" else Stream()
    options = {"max_steps": 30, "accelerator_config": {"dispatch_batches": False}}
    trainer = make_trainer(pack(dataset, 64), tmp_path, per_device_train_batch_size=2, **options)
    trainer.train()
    assert trainer.state.global_step == 30
    recorded = trainer.data_collator.batches
    packs = len(list(pack(dataset, 64)))
    first_epoch = [i for batch in recorded[: math.ceil(packs / 2)] for i in batch]
    assert sorted(first_epoch) == list(range(len(LENGTHS)))


def test_evaluation_takes_every_example_once(tmp_path):
    trainer = make_trainer([], tmp_path, per_device_eval_batch_size=3)
    trainer.evaluate(pack(examples(), 64))
    assert sorted(i for batch in trainer.data_collator.batches for i in batch) == list(
        range(len(LENGTHS))
    )
