"""Batches of sounds and what they say: the layout, the mask of frames, what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastft
from fastft.data.collator import PackingCollator

START, PAD = 50, 1


def collator(**options: Any) -> PackingCollator:
    usual = {"decoder_start_token_id": START, "pad_token_id": PAD}
    return PackingCollator(task="speech_seq2seq", **{**usual, **options})


def spoken(sizes: list[int], frames: list[int] | None = None) -> list[dict[str, Any]]:
    """Examples whose sounds and first labels tell their number."""
    return [
        {
            "input_features": torch.full(((frames or [4] * len(sizes))[index], 2), index + 1.0),
            "labels": [100 + index, *range(2, size + 1)],
        }
        for index, size in enumerate(sizes)
    ]


def test_keys() -> None:
    batch = collator(pad_to_multiple_of=4)(spoken([3, 2]))
    assert batch["labels"].tolist() == [[100, 2, 3, 101, 2, -100, -100, -100]]
    assert batch["decoder_input_ids"].tolist() == [[START, 100, 2, START, 101, 2, PAD, PAD]]
    # padding belongs to the last example, and has a place in every table
    assert batch["decoder_position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch["decoder_cu_seq_lens"].tolist() == [0, 3, 8] and batch["decoder_max_length"] == 5
    assert batch["decoder_cu_seq_lens"].dtype == torch.int32 and batch.counted == 5
    assert batch["input_features"].shape == (2, 4, 2) and "attention_mask" not in batch
    assert batch["use_cache"] is False
    # Trainer counts the examples of a batch by its first tensor
    assert next(iter(batch)) == "input_features"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 20),
    st.none() | st.integers(1, 8),
)
def test_rows_are_no_longer_than_they_may_be(
    sizes: list[int], row_tokens: int, multiple: int | None
) -> None:
    batch = collator(row_tokens=row_tokens, pad_to_multiple_of=multiple)(spoken(sizes))
    labels, width = batch["labels"], batch["labels"].shape[1]
    longest = max(row_tokens, *sizes)
    assert width <= longest + -longest % (multiple or 1)
    ends, flat = batch["decoder_cu_seq_lens"].tolist(), labels.view(-1)
    assert len(ends) == len(sizes) + 1 and ends[-1] == labels.numel()
    for segment, (begin, end) in enumerate(itertools.pairwise(ends)):
        example = int(flat[begin]) - 100
        assert batch["input_features"][segment, 0, 0] == example + 1
        assert begin // width == (end - 1) // width
        said = flat[begin:end][flat[begin:end] != -100]
        assert said.tolist() == [100 + example, *range(2, sizes[example] + 1)]
        places = batch["decoder_position_ids"].view(-1)[begin:end]
        assert places[: len(said)].tolist() == [*range(len(said))]
        assert batch["decoder_input_ids"].view(-1)[begin] == START


def test_sounds_of_different_lengths_have_a_mask_of_their_frames() -> None:
    batch = collator(row_tokens=3)(spoken([1, 3, 2], frames=[4, 2, 3]))
    first = batch["labels"].view(-1)[batch["decoder_cu_seq_lens"][:-1].long()] - 100
    lengths = [[4, 2, 3][example] for example in first.tolist()]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_features"] != 0).all(-1).sum(1).tolist() == lengths


def test_a_mask_of_the_examples_own_is_kept() -> None:
    examples = [{**one, "attention_mask": [1, 1, 1, 0]} for one in spoken([1, 2])]
    assert collator()(examples)["attention_mask"].tolist() == [[1, 1, 1, 0]] * 2


@pytest.mark.parametrize("form", ["lists", "numpy", "float64"])
def test_any_form_of_sounds(form: str) -> None:
    expected = collator()(spoken([3, 1]))
    forms = {
        "lists": lambda sound: sound.tolist(),
        "numpy": lambda sound: sound.numpy(),
        "float64": lambda sound: sound.numpy().astype(numpy.float64),
    }
    examples = [
        {**one, "input_features": forms[form](one["input_features"])} for one in spoken([3, 1])
    ]
    batch = collator()(examples)
    assert torch.equal(batch["input_features"], expected["input_features"])
    assert batch["input_features"].dtype == torch.float32


def test_padded_examples_have_a_row_each() -> None:
    batch = collator(pad_examples=True)(spoken([3, 1]))
    assert batch["labels"].tolist() == [[100, 2, 3], [101, -100, -100]]
    assert batch["decoder_input_ids"].tolist() == [[START, 100, 2], [START, 101, PAD]]
    assert "decoder_cu_seq_lens" not in batch and "decoder_position_ids" not in batch


def changed(**columns: Any) -> list[dict[str, Any]]:
    return [{**one, **columns} for one in spoken([3, 1])]


REFUSED = {
    "no sound": (changed, {}, "needs input_features or input_values, the examples have"),
    "no labels": (changed, {}, "needs labels, an example has"),
    "sounds that differ in two ways": (
        lambda: [
            {"input_features": torch.ones(3, 2), "labels": [1]},
            {"input_features": torch.ones(2, 3), "labels": [1]},
        ],
        {},
        "differ in more than their length",
    ),
    "text for a sound": (lambda: changed(input_features="hm"), {}, "must be an array of numbers"),
    "one number": (lambda: changed(input_features=1.0), {}, "must be an array, got"),
    "no start": (changed, {"decoder_start_token_id": None}, "needs decoder_start_token_id"),
    "other decoder_input_ids": (
        lambda: changed(decoder_input_ids=[1, 2]),
        {},
        "decoder_input_ids of example 0 has length 2, its labels 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_examples_that_are_refused(case: str) -> None:
    make, options, message = REFUSED[case]
    taken = {"no sound": "input_features", "no labels": "labels"}.get(case)
    examples = [{key: one[key] for key in one if key != taken} for one in make()]
    with pytest.raises(ValueError, match=message):
        collator(**options)(examples)


def test_options_that_are_refused() -> None:
    for options, message in (
        ({"rows": 2}, "rows=2 does not go with"),
        ({"expand_on_device": True}, "expand_on_device does not go with"),
        ({"row_tokens": 0}, "row_tokens must be"),
    ):
        with pytest.raises(ValueError, match=message):
            collator(**options)
    with pytest.raises(ValueError, match="no input_ids to pack"):
        fastft.pack(spoken([3, 1]), 8)
    with pytest.raises(TypeError, match="the collator takes dicts or packs, got int"):
        collator()([3])
