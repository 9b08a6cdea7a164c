"""The packed batch: transformers' where it has one, and what must hold for every task, number of
rows and multiple."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_examples import FORMS, assert_same, make, unpacked
from support.versions import chosen_logits

from fastft.data.collator import PackingCollator

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", ["auto", "eager", "cpp"])
@pytest.mark.parametrize("labels", [{}, {"labels": 100}])
@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [3, 1, 5], [63, 507]])
@pytest.mark.parametrize("start", [0, 2])
def test_equals_flattening_collator(form, impl, labels, sizes, start, poisoned_empty):
    ours = PackingCollator(impl=impl, position_ids_start=start)(make(sizes, form, **labels))
    flattening = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True, position_ids_start=start
    )
    assert_same(ours, {**flattening(make(sizes, **labels)), "use_cache": False})


EXAMPLES = st.lists(st.integers(1, 40), min_size=1, max_size=20)
TASKS = ["causal_lm", "token_classification", "masked_lm", "sequence_classification", "seq2seq"]


@settings(max_examples=250, deadline=None)
@given(
    EXAMPLES,
    st.sampled_from(TASKS),
    st.integers(1, 4),
    st.none() | st.integers(1, 64),
    st.integers(0, 2),
    st.booleans(),
)
def test_nothing_is_lost_and_segments_add_up(sizes, task, rows, multiple, start, given_labels):
    examples = make(sizes)
    for index, example in enumerate(examples):
        if task == "sequence_classification":
            example["label"] = index
        elif given_labels or task != "causal_lm":
            example["labels"] = list(
                range(100, 100 + (sizes[-1 - index] if task == "seq2seq" else sizes[index]))
            )
    options = {
        "task": task,
        "rows": rows,
        "pad_to_multiple_of": multiple,
        "position_ids_start": start,
    }
    native, eager = (
        PackingCollator(**options, impl=impl, pad_token_id=999, decoder_start_token_id=0)(examples)
        for impl in ("cpp", "eager")
    )
    assert_same(native, eager)

    shape, segments = native["input_ids"].shape, native["cu_seq_lens_q"].diff().tolist()
    width = shape[1]
    assert shape[0] == min(rows, len(sizes)) and width % (multiple or 1) == 0
    assert sum(segments) == native["input_ids"].numel() and native["max_length_q"] == max(segments)
    assert {0, width} <= {
        0,
        *(end % width or width for end in native["cu_seq_lens_q"][1:].tolist()),
    }
    # no segment crosses rows
    assert all(row * width in native["cu_seq_lens_q"] for row in range(shape[0]))
    texts = unpacked(native, "input_ids")
    real = [segment for segment, text in enumerate(texts) if set(text) != {999}]
    assert sorted(texts[segment] for segment in real) == sorted(
        example["input_ids"] for example in examples
    )
    assert unpacked(native, "position_ids") == [list(range(start, start + n)) for n in segments]
    assert unpacked(native, "seq_idx") == [[segment] * n for segment, n in enumerate(segments)]
    check_labels(native, task, examples, real)


def check_labels(batch, task, examples, real):
    """Every example has its labels, and padding has none."""
    by_text = {tuple(example["input_ids"]): example for example in examples}
    in_order = [by_text[tuple(unpacked(batch, "input_ids")[segment])] for segment in real]
    if task == "sequence_classification":
        texts, segments = unpacked(batch, "input_ids"), batch["label_segments"].tolist()
        assert sorted(segments) == real
        assert [texts[segment] for segment in segments] == [
            example["input_ids"] for example in examples
        ]
        assert batch["labels"].tolist() == [example["label"] for example in examples]
        assert batch.counted == len(examples)
        return
    expected = [list(example.get("labels", example["input_ids"])) for example in in_order]
    if task == "causal_lm":
        expected = [[-100, *labels[1:]] for labels in expected]
    segments = unpacked(
        batch, "labels", "decoder_cu_seq_lens" if task == "seq2seq" else "cu_seq_lens_q"
    )
    assert [segments[segment] for segment in real] == expected
    padding = [
        label for segment, labels in enumerate(segments) if segment not in real for label in labels
    ]
    assert set(padding) <= {-100}
    assert batch.counted == int((batch["labels"] != -100).sum())


def test_token_classification_keeps_the_first_label_and_needs_none():
    collator = PackingCollator(task="token_classification", pad_to_multiple_of=4)
    assert collator(make([2, 1], labels=5))["labels"].tolist() == [[5, 6, 5, -100]]
    without = collator(make([2, 1]))
    assert "labels" not in without and without.counted is None


@pytest.mark.parametrize("rows", [1, 2])
def test_class_labels(rows):
    def labels(values, key="labels"):
        examples = [
            {**example, key: value} for example, value in zip(make([1, 5, 4]), values, strict=True)
        ]
        return PackingCollator(task="sequence_classification", rows=rows)(examples)["labels"]

    for key in ("labels", "label", "label_ids"):
        assert labels([4, 5, 6], key).tolist() == [4, 5, 6]
    assert labels([torch.tensor(4), 5, True]).dtype == torch.int64
    assert labels([4.0, 5.0, 6.5]).dtype == torch.float32
    several = labels([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert several.shape == (3, 2) and several.dtype == torch.float32
    # as many labels as tokens are no labels of tokens
    assert labels([[1], [2], [3]]).tolist() == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("task", "example", "message"),
    [
        (
            "sequence_classification",
            {"labels": "a"},
            "labels of example 1 must be numbers, got 'a'",
        ),
        (
            "sequence_classification",
            {"labels": None},
            "labels of example 1 must be numbers, got None",
        ),
        (
            "sequence_classification",
            {"labels": [1, 2]},
            r"labels of example 1 has shape \(2,\), of example 0 \(\)",
        ),
        (
            "sequence_classification",
            {"labels": [[1]]},
            r"must be one number or a vector, got shape \(1, 1\)",
        ),
        (
            "sequence_classification",
            {"labels": []},
            r"must be one number or a vector, got shape \(0,\)",
        ),
        (
            "token_classification",
            {"labels": 1},
            "labels of example 0 must hold one number per token, got int 1",
        ),
        ("seq2seq", {"labels": 1}, "labels of example 0 must hold one number per token, got int 1"),
    ],
)
def test_bad_labels(task, example, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(task=task)(
            [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [3, 4], **example}]
        )


@chosen_logits
def test_supervised_rows():
    """The mask covers every row, and no row's last token predicts the first of the next."""
    batch = PackingCollator(supervised_only=True, rows=2)(make([3, 3, 2], labels=50))
    assert batch["logits_to_keep"].tolist() == [
        [True, True, False, True, False],
        [True, True, False, False, False],
    ]
    assert batch["shift_labels"].tolist() == [51, 52, 51, 51, 52]


def test_collator_pickles():
    collator = pickle.loads(pickle.dumps(PackingCollator(pad_to_multiple_of=4)))
    assert_same(collator(make([3])), PackingCollator(pad_to_multiple_of=4)(make([3])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "clm"}, "task must be one of 'causal_lm', .*, got 'clm'"),
        ({"task": ["causal_lm"]}, r"task must be one of .*, got \['causal_lm'\]"),
        ({"rows": 0}, r"rows must be an integer in \[1, 2\^63\), got 0"),
        ({"rows": 2.0}, r"rows must be an integer .*, got 2\.0"),
        ({"position_ids_start": -1}, r"position_ids_start must be an integer in \[0, 2\^31\), got"),
        ({"position_ids_start": 2**31}, "position_ids_start must be an integer .*, got 21474"),
        # GPT-2's tokenizer has none
        ({"pad_token_id": None}, r"pad_token_id must be an integer in \[0, 2\^63\), got None"),
        ({"pad_token_id": 2**63}, "pad_token_id must be an integer .*, got 9223"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be an integer .* or None, got 0"),
        (
            {"pad_to_multiple_of": True},
            "pad_to_multiple_of must be an integer .* or None, got True",
        ),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id must be an integer .*, got -1"),
        ({"decoder_start_token_id": "x"}, "decoder_start_token_id must be an integer .*, got 'x'"),
        ({"seed": "x"}, r"seed must be an integer in \[0, 2\^63\) or None, got 'x'"),
        ({"seed": 1.5}, r"seed must be an integer .* or None, got 1\.5"),
        ({"impl": "numpy"}, "impl must be"),
        ({"impl": "numpy", "expand_on_device": True}, "impl must be"),
        (
            {"supervised_only": True, "task": "token_classification"},
            "supervised_only does not go with task 'token_class",
        ),
        (
            {"supervised_only": True, "expand_on_device": True},
            "supervised_only does not go with expand_on_device",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(**options)


@pytest.mark.parametrize("options", [{"pad_examples": "x"}, {"expand_on_device": 1}])
def test_what_is_no_bool(options):
    (name,) = options
    with pytest.raises(TypeError, match=f"{name} must be True or False, got {options[name]!r}"):
        PackingCollator(**options)


@pytest.mark.parametrize("expand", [False, True])
def test_columns_named_as_the_collators_own_are_kept_or_refused(expand):
    """Nothing is replaced or lost without a word."""
    made = {"input_ids": [1, 2, 3]}
    written: set[str] = set()
    for task in TASKS:
        examples = make([3, 4], labels=1)
        if task == "sequence_classification":
            examples = [{**example, "labels": 1} for example in examples]
        collator = PackingCollator(
            task=task, rows=2, decoder_start_token_id=0, expand_on_device=expand
        )
        written |= set(collator(examples).to("cpu"))
    for name in {*written, "lengths", "ignored", "integers", "count"} - {
        "input_ids",
        "labels",
        "decoder_input_ids",
    }:
        examples = [{**made, name: [7, 8, 9]}, {**made, name: [7, 8, 9]}]
        try:
            batch = PackingCollator(expand_on_device=expand)(examples).to("cpu")
        except ValueError as error:
            assert name in str(error)
        else:
            assert batch[name].tolist() == [[7, 8, 9] * 2] or name == "seq_idx"


@chosen_logits
def test_columns_named_as_those_of_supervised_rows_are_refused():
    made = {"input_ids": [1, 2, 3]}
    for name in ("logits_to_keep", "shift_labels"):
        with pytest.raises(
            ValueError,
            match=f"the examples have a column '{name}', which the collator makes itself",
        ):
            PackingCollator(supervised_only=True)([{**made, name: [7, 8, 9]}])
        assert PackingCollator()([{**made, name: [7, 8, 9]}])[name].tolist() == [[7, 8, 9]]


def test_explicit_engine_never_falls_back():
    for impl in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=r"it computes cuda.* tensors, these are on cpu"):
            PackingCollator(impl=impl)
        with pytest.raises(RuntimeError, match=r"it computes cuda.* tensors, these are on cpu"):
            PackingCollator(impl=impl, expand_on_device=True)(make([2])).to("cpu")
