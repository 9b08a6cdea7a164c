"""Evaluation and prediction with a `PackingCollator`: every example once, in the dataset's order,
or a sentence."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.evaluations import (
    MODELS,
    OPTIONS,
    alone,
    assert_rows,
    assert_tokens,
    examples_for,
    logits_of,
    model_for,
    pad,
    trainer_for,
)

import fastft
from fastft.data.collator import PackingCollator
from fastft.data.packed import pack

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

BATCH_SIZES = [1, 4, 11]


def predicted(
    task: str, collator: Any, size: int, dataset: Any, tmp_path: Any, **options: Any
) -> Any:
    trainer = trainer_for(task, str(tmp_path), collator, size, **options)
    with fastft.packed_attention(trainer.model), warnings.catch_warnings():
        warnings.simplefilter(
            "error" if not isinstance(dataset, fastft.data.packed.PackedDataset) else "ignore"
        )
        return trainer.predict(dataset)


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("task", MODELS)
def test_padded_examples_are_evaluated_as_stock_does(task, size, tmp_path):
    data = datasets.Dataset.from_list(examples_for(task))
    collator = PackingCollator(task=task, pad_examples=True, **OPTIONS.get(task, {}))
    ours = predicted(task, collator, size, data, tmp_path)
    stock = predicted(task, lambda rows: pad(task, rows), size, data, tmp_path, attention="sdpa")
    assert_rows(task, ours)
    assert np.array_equal(ours.label_ids, stock.label_ids)
    assert logits_of(ours).shape == logits_of(stock).shape
    assert ours.metrics["test_loss"] == pytest.approx(
        stock.metrics["test_loss"], rel=1e-5, nan_ok=True
    )


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("task", MODELS)
def test_an_example_in_each_row_is_a_row_of_predictions(task, size, tmp_path):
    collator = PackingCollator(task=task, rows=size, **OPTIONS.get(task, {}))
    assert_rows(task, predicted(task, collator, size, examples_for(task), tmp_path))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("size", BATCH_SIZES)
def test_labels_of_packed_examples_come_in_the_order_of_the_dataset(rows, size, tmp_path):
    task = "sequence_classification"
    data = datasets.Dataset.from_list(examples_for(task))
    collator = PackingCollator(task=task, rows=rows)
    ours = predicted(task, collator, size, data, tmp_path)
    assert_rows(task, ours)
    stock = predicted(task, lambda made: pad(task, made), size, data, tmp_path, attention="sdpa")
    assert ours.metrics["test_loss"] == pytest.approx(
        stock.metrics["test_loss"], rel=1e-5, nan_ok=True
    )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_labelled_example_of_packs_is_predicted_once(rows, size, tmp_path):
    """accelerate would cut the last batch by the number of packs."""
    task = "sequence_classification"
    packed = pack(examples_for(task), 16)
    collator = PackingCollator(task=task, rows=rows)
    ours = predicted(task, collator, size, packed, tmp_path)
    assert_rows(task, ours, packed.plan.indices.tolist())


def test_every_labelled_example_of_a_stream_is_predicted_once(tmp_path):
    task = "sequence_classification"
    packed = pack(datasets.Dataset.from_list(examples_for(task)).to_iterable_dataset(), 16)
    order = [examples_for(task).index(dict(one)) for each in list(packed) for one in each.examples]
    trainer = trainer_for(
        task,
        str(tmp_path),
        PackingCollator(task=task),
        2,
        accelerator_config={"dispatch_batches": False},
    )
    with pytest.warns(UserWarning, match="come in the order of the packs: not of the examples"):
        assert_rows(task, trainer.predict(packed), order)


@pytest.mark.parametrize("kind", ["packs", "examples", "stream"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("task", [task for task in MODELS if task != "sequence_classification"])
def test_every_token_of_packed_rows_is_predicted_once(task, size, kind, tmp_path):
    data: Any = examples_for(task)
    if kind == "packs":
        data = pack(data, 16)
    if kind == "stream":
        data = pack(datasets.Dataset.from_list(data).to_iterable_dataset(), 16)
    collator = PackingCollator(task=task, **OPTIONS.get(task, {}))
    options = {"accelerator_config": {"dispatch_batches": False}}
    assert_tokens(task, predicted(task, collator, size, data, tmp_path, **options))


def test_the_order_of_packs_is_spoken_of_once(tmp_path):
    task = "sequence_classification"
    packed = pack(examples_for(task), 16)
    trainer = trainer_for(task, str(tmp_path), PackingCollator(task=task), 2)
    with pytest.warns(
        UserWarning, match=r"order of the packs: row i is example packed.plan.indices\[i\]"
    ):
        trainer.predict(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.evaluate(packed)
        trainer.predict(examples_for(task))


def test_generation_gives_a_text_for_each_padded_example(tmp_path):
    """Trained on packs, evaluated on examples, by one collator."""
    data = examples_for("seq2seq")
    collator = PackingCollator(task="seq2seq", decoder_start_token_id=0, pad_examples=True)
    options = {"predict_with_generate": True, "generation_max_length": 6, "max_steps": 2}
    trainer = trainer_for(
        "seq2seq", str(tmp_path), collator, 4, **options, callbacks=[fastft.PackingCallback()]
    )
    trainer.train_dataset = pack(data, 24)
    trainer.train()
    made = trainer.predict(data).predictions
    assert len(made) == len(data)
    model = trainer.model
    for one, row in zip(data, made, strict=True):
        alone = model.generate(
            input_ids=torch.tensor([one["input_ids"]]), max_length=6, do_sample=False
        )[0]
        assert row[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("callback", [fastft.PackingCallback, fastft.FusedLossCallback])
def test_generation_from_packed_rows_is_refused_before_anything_is_trained(callback, tmp_path):
    collator = PackingCollator(task="seq2seq", decoder_start_token_id=0)
    trainer = trainer_for(
        "seq2seq", str(tmp_path), collator, 4, predict_with_generate=True, callbacks=[callback()]
    )
    trainer.train_dataset = examples_for("seq2seq")
    with pytest.raises(
        ValueError, match=r"predict_with_generate=True .* PackingCollator\(pad_examples=True\)"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_padded_batches_keep_other_columns_and_multiples():
    examples = [
        {"input_ids": [5, 6, 7], "token_type_ids": [1, 1, 1]},
        {"input_ids": [8], "token_type_ids": [2]},
    ]
    batch = PackingCollator(pad_examples=True, pad_to_multiple_of=4, pad_token_id=9)(examples)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 9], [8, 9, 9, 9]],
        "token_type_ids": [[1, 1, 1, 0], [2, 0, 0, 0]],
        "labels": [[5, 6, 7, -100], [8, -100, -100, -100]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
    }
    masked = PackingCollator(pad_examples=True)(
        [{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}]
    )
    assert masked["input_ids"].tolist() == [[5, 6]]
    with pytest.raises(
        ValueError,
        match=r"example 0 is 2 documents, .* with pad_examples each would see the others",
    ):
        PackingCollator(pad_examples=True)([{"input_ids": [1, 2], "position_ids": [0, 0]}])


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_trainer_groups_packs_by_their_tokens(strategy, tmp_path):
    task = "causal_lm"
    packed = pack(examples_for(task), 16)
    trainer = trainer_for(
        task, str(tmp_path), PackingCollator(), 2, train_sampling_strategy=strategy, max_steps=4
    )
    trainer.train_dataset = packed
    assert [len(one["input_ids"]) for one in packed] == [
        sum(len(e["input_ids"]) for e in one.examples) for one in packed
    ]
    trainer.train()
    assert trainer.state.global_step == 4
    trainer.evaluate(packed)


@pytest.mark.parametrize(
    ("task", "kind", "column"),
    [
        *(
            ("token_classification", "arrow", column)
            for column in ("word_ids", "spans", "doc_hash", "source", "mapping")
        ),
        ("causal_lm", "arrow", "spans"),
        ("causal_lm", "list", "spans"),
        ("causal_lm", "stream", "offset_mapping"),
    ],
)
def test_trainer_removes_from_packs_what_the_model_does_not_take(column, kind, task, tmp_path):
    values = {
        "word_ids": lambda n: [1, 2],
        "spans": lambda n: [[0, 1]] * n,
        "offset_mapping": lambda n: [[0, 1]] * n,
        "doc_hash": lambda n: [1] * n,
        "source": lambda n: "x",
        "mapping": lambda n: 3,
    }[column]
    rows = [{**one, column: values(len(one["input_ids"]))} for one in examples_for(task)]
    make = {
        "list": list,
        "arrow": datasets.Dataset.from_list,
        "stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    }[kind]
    options = {"accelerator_config": {"dispatch_batches": False}}
    assert_tokens(
        task,
        predicted(task, PackingCollator(task=task), 2, pack(make(rows), 16), tmp_path, **options),
    )


def test_columns_that_the_model_does_not_take_stay_an_error_without_trainer():
    rows = [{"input_ids": [1, 2, 3], "word_ids": [1, 2]}]
    with pytest.raises(ValueError, match="word_ids of example 0 has length 2, its input_ids 3"):
        PackingCollator()([pack(rows, 8)[0]])


def test_pooling_takes_examples_in_the_order_of_their_labels():
    """Rows that are balanced move examples; their logits do not move."""
    task = "sequence_classification"
    model, expected = model_for(task), torch.stack(alone(task))
    with torch.no_grad(), fastft.packed_attention(model):
        for rows in (1, 3):
            batch = PackingCollator(task=task, rows=rows)(examples_for(task))
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert batch["label_segments"].tolist() != sorted(batch["label_segments"].tolist())
