from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data.collator import BOUNDARIES, Pack, PackingCollator

transformers = pytest.importorskip("transformers")

FORMS = {
    "list": lambda values: list(values),
    "tuple": lambda values: tuple(values),
    "numpy": lambda values: np.array(values, np.int64),
    "numpy int32": lambda values: np.array(values, np.int32),
    "numpy strided": lambda values: np.repeat(np.array(values), 2)[::2],
    "torch": lambda values: torch.tensor(values),
    "torch int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "torch strided": lambda values: torch.tensor(values).repeat_interleave(2)[::2],
}


def make(sizes: list[int], form: str = "list", **others: int) -> list[dict]:
    """Examples of the given sizes; `others` are further keys and the first of their values."""
    made = FORMS[form]
    return [
        {"input_ids": made(range(9 * i, 9 * i + n)), **{key: made(range(v, v + n)) for key, v in others.items()}}
        for i, n in enumerate(sizes)
    ]


def assert_same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert ours[key] == value and type(ours[key]) is type(value)


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


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
    st.none() | st.integers(1, 64),
    st.booleans(),
    st.integers(0, 3),
)
def test_engines_agree_and_segments_add_up(sizes, multiple, labels, start):
    examples = make(sizes, **({"labels": 100} if labels else {}))
    native, eager = (
        PackingCollator(impl=impl, pad_to_multiple_of=multiple, position_ids_start=start)(examples)
        for impl in ("cpp", "eager")
    )
    assert_same(native, eager)
    tokens = native["input_ids"].numel()
    assert tokens % (multiple or 1) == 0 and 0 <= tokens - sum(sizes) < (multiple or 1)
    segments = native["cu_seq_lens_q"].diff().tolist()
    assert segments == sizes + [tokens - sum(sizes)] * (tokens > sum(sizes))
    assert native["max_length_q"] == max(segments)
    counted = int((native["labels"] != -100).sum())
    assert counted == sum(sizes) - len(sizes)


def test_padding_is_a_segment_of_its_own():
    batch = PackingCollator(pad_to_multiple_of=8, pad_token_id=7)(make([3, 2], labels=50, token_type_ids=1))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 9, 10, 7, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 51, 52, -100, 51, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 8] and batch["max_length_k"] == 3
    assert batch["token_type_ids"].tolist() == [[1, 2, 3, 1, 2, 0, 0, 0]]


def test_large_batches_run_in_parallel_with_the_same_result():
    sizes = [1, 200_000, 3, 65_536, 70_001]
    batches = [PackingCollator(impl=impl)(make(sizes, "torch")) for impl in ("cpp", "eager")]
    assert_same(*batches)


@pytest.mark.parametrize("form", FORMS)
def test_attention_mask_takes_tokens_out(form):
    masks = [[1, 1, 1], [0, 1, 1, 0], [1]]
    examples = make([3, 4, 1], form, labels=30)
    for example, mask in zip(examples, masks, strict=True):
        example["attention_mask"] = FORMS[form](mask)
    expected = [
        {"input_ids": [0, 1, 2], "labels": [30, 31, 32]},
        {"input_ids": [10, 11], "labels": [31, 32]},
        {"input_ids": [18], "labels": [30]},
    ]
    before = [dict(example) for example in examples]
    assert_same(PackingCollator()(examples), PackingCollator()(expected))
    assert [example.keys() for example in examples] == [example.keys() for example in before]
    assert all(
        example[key] is value for example, old in zip(examples, before, strict=True) for key, value in old.items()
    )


def test_other_keys_per_token_are_kept_and_the_rest_left_out():
    examples = [
        {
            "input_ids": [1, 2],
            "weights": [0.5, 1.0],
            "special": [True, False],
            "text": "ab",
            "length": 2,
            "tags": ["a"],
        },
        {"input_ids": [3], "weights": [2.0], "special": [False], "text": "c", "length": 1, "tags": ["b"]},
    ]
    batch = PackingCollator()(examples)
    torch.testing.assert_close(batch["weights"], torch.tensor([[0.5, 1.0, 2.0]]))
    assert batch["special"].tolist() == [[1, 0, 0]]
    assert not {"text", "length", "tags", "attention_mask"} & set(batch)


def test_packs_and_examples_may_be_mixed():
    examples = make([3, 4, 2])
    collator = PackingCollator()
    assert_same(collator([Pack(examples[:2]), examples[2]]), collator(examples))


def test_inputs_are_not_changed():
    examples = make([3, 4], "torch", labels=5)
    PackingCollator()(examples[:1])
    PackingCollator()(examples)
    assert examples[0]["labels"].tolist() == [5, 6, 7] and examples[0]["input_ids"].tolist() == [0, 1, 2]


def test_collator_pickles():
    collator = pickle.loads(pickle.dumps(PackingCollator(pad_to_multiple_of=4)))
    assert_same(collator(make([3])), PackingCollator(pad_to_multiple_of=4)(make([3])))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "got no examples"),
        ([Pack([])], "got no examples"),
        ([{"input_ids": [1]}, {"labels": [1]}], r"example 1 has no input_ids, only \['labels'\]"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "example 1 has the keys .*'labels'"),
        ([{"input_ids": [1]}, {"input_ids": []}], "example 1 has no tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "example 0 has no tokens: its attention_mask is all zeros"),
        ([{"input_ids": [1, 2], "labels": [1]}], "labels of example 0 has length 1, its input_ids 2"),
        ([{"input_ids": [1, 2], "labels": 1}], "labels of example 0 must hold one number per token, got int 1"),
        ([{"input_ids": [1, 2], "labels": torch.tensor(1)}], r"labels of example 0 must hold .*, got shape \(\)"),
        ([{"input_ids": [1, 2], "weights": [1.0]}], "weights of example 0 has length 1"),
        ([{"input_ids": [1, 2], "pixels": np.zeros((2, 3))}], r"pixels of example 0 must .* got shape \(2, 3\)"),
        ([{"input_ids": "ab"}], "input_ids of example 0 must hold one number per token, got str 'ab'"),
        ([{"input_ids": ["a", "b"]}], "input_ids must hold one number per token"),
        ([{"input_ids": [[1], [2]]}], "input_ids must hold one number per token"),
        ([{"input_ids": [1.0, 2.0]}], "input_ids must be integers, got torch.float32"),
        ([{"input_ids": [1], "labels": np.array([1.0])}], "labels must be integers, got torch.float64"),
    ],
)
def test_bad_examples(examples, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator()(examples)


def test_bad_feature():
    with pytest.raises(TypeError, match="dicts or packs, got list"):
        PackingCollator()([[1, 2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "masked_lm"}, "task must be one of 'causal_lm', got 'masked_lm'"),
        ({"rows": 2}, "rows must be 1, got 2"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be a positive integer or None, got 0"),
        ({"impl": "numpy"}, "impl must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(**options)


def test_explicit_engine_never_falls_back():
    with pytest.raises(RuntimeError, match="no cuda kernel"):
        PackingCollator(impl="cuda")


@pytest.mark.parametrize("lengths", [[1, 2], [2, 2], [4, -1], [5]])
def test_kernel_refuses_lengths_that_do_not_add_up(lengths):
    source = torch.arange(3)
    out = torch.empty_like(source), torch.empty_like(source), torch.empty(3, dtype=torch.int32)
    cu_seqlens = torch.empty(len(lengths) + 1, dtype=torch.int32)
    if sum(lengths) == 3 and min(lengths) >= 0:
        BOUNDARIES.native(torch.tensor(lengths), source, 0, 0, *out, cu_seqlens)
        assert cu_seqlens.tolist() == [0, 1, 3]
        return
    with pytest.raises(RuntimeError, match="lengths do not add up to 3 tokens"):
        BOUNDARIES.native(torch.tensor(lengths), source, 0, 0, *out, cu_seqlens)
