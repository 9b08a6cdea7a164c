"""From examples to columns: every form of input, and what is wrong with one, by its name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.packed_examples import FORMS, assert_same, make

from fastft.data import listed
from fastft.data.collator import PackingCollator
from fastft.data.columns import flatten, padding_like
from fastft.data.features import arrow_examples, columns_of
from fastft.data.pack import Pack


class _Number:
    """An integer by its __index__, which does as it is told before it answers."""

    def __init__(self, number, before=lambda: None):
        self.number, self.before = number, before

    def __index__(self):
        self.before()
        return self.number


@pytest.fixture(params=["native", "python"])
def reader(request, monkeypatch):
    """Lists are read by the native library, and as they are without it."""
    if request.param == "python":
        monkeypatch.setattr(listed, "_reader", lambda: None)
    elif not listed.can_read():
        pytest.skip("the native library does not read lists here")


@pytest.mark.usefixtures("reader")
def test_what_is_an_integer_in_a_list():
    kinds = [[-1, True, 2**63 - 1, -(2**63)], [], [np.int32(7), _Number(8), torch.tensor(9)]]
    found = flatten("labels", kinds)
    assert found.dtype == torch.int64
    assert found.tolist() == [-1, 1, 2**63 - 1, -(2**63), 7, 8, 9]
    assert flatten("weights", [[1, -1], [0.5]]).tolist() == [1.0, -1.0, 0.5]


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("beyond", [2**63, -(2**63) - 1, 2**200])
def test_what_is_no_integer_of_int64_in_a_list(beyond):
    with pytest.raises(ValueError, match="labels holds an integer that does not fit into int64"):
        flatten("labels", [[1], [2, beyond]])
    for wrong in ("a", None, [1], 1j):
        with pytest.raises(ValueError, match="labels must hold one number per token"):
            flatten("labels", [[1], [2, wrong]])


@pytest.mark.usefixtures("reader")
def test_an_error_of_a_numbers_own_is_passed_on():
    def fail():
        raise LookupError("no number yet")

    with pytest.raises(LookupError, match="no number yet"):
        flatten("labels", [[1], [2, _Number(3, fail), 4]])


@pytest.mark.skipif(not listed.can_read(), reason="the native library does not read lists here")
def test_a_list_that_shrinks_while_it_is_read_is_refused():
    shrinking = [1, 2, 3, 4]
    shrinking[1] = _Number(2, lambda: shrinking.__delitem__(slice(2, None)))
    assert listed.integers_of_lists([shrinking]) is None


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
    for options in ({}, {"pad_to_multiple_of": 5}, {"rows": 2}):
        assert_same(PackingCollator(**options)(examples), PackingCollator(**options)(expected))
    assert [example.keys() for example in examples] == [example.keys() for example in before]
    assert all(
        example[key] is value
        for example, old in zip(examples, before, strict=True)
        for key, value in old.items()
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
            "seq_idx": 5,
            "attention_mask": None,
        },
        {
            "input_ids": [3],
            "weights": [2.0],
            "special": [False],
            "text": "c",
            "length": 1,
            "tags": ["b"],
            "seq_idx": 6,
            "attention_mask": None,
        },
    ]
    batch = PackingCollator()(examples)
    torch.testing.assert_close(batch["weights"], torch.tensor([[0.5, 1.0, 2.0]]))
    assert batch["special"].tolist() == [[1, 0, 0]]
    assert not {"text", "length", "tags", "attention_mask"} & set(batch)


@pytest.mark.parametrize(
    "values",
    [
        [[0.5, 1.5], [2.5]],
        [np.array([0.5, 1.5], np.float32), np.array([2.5], np.float32)],
        [torch.tensor([0.5, 1.5]), torch.tensor([2.5])],
        [torch.tensor([0.5, 1.5]), [2.5]],
    ],
)
def test_padding_does_not_change_the_dtype(values):
    flat = flatten("weights", [*values, padding_like(values[0], 2, 0)])
    assert flat.dtype == torch.float32 and flat.tolist() == [0.5, 1.5, 2.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64, np.bool_, np.float16, np.float64]
)
def test_dtypes(dtype):
    values = [np.array([1, 0], dtype), np.array([1], dtype)]
    flat = flatten("x", [*values, padding_like(values[0], 1, -100)])
    assert flat.tolist() == [1, 0, 1, -100]
    assert flat.is_floating_point() == np.issubdtype(dtype, np.floating) and (
        flat.is_floating_point() or flat.dtype == torch.int64
    )
    tensors = [
        torch.from_numpy(value.astype(np.int64 if dtype == np.uint32 else dtype))
        for value in values
    ]
    assert flatten("x", tensors).tolist() == [1, 0, 1]


INTEGERS = (
    st.integers(-(2**63), 2**63 - 1)
    | st.booleans()
    | st.integers(-9, 9).map(np.int16)
    | st.integers(0, 2**63 - 1).map(np.uint64)
)
OTHERS = st.floats(width=32, allow_nan=False) | st.sampled_from([2**63, -(2**63) - 1])


@given(st.lists(st.lists(INTEGERS, max_size=5), max_size=4), st.none() | OTHERS, st.data())
def test_lists_of_integers_lose_none_and_others_are_found(lists, other, data):
    if other is None or not lists:
        flat = flatten("x", lists)
        assert flat.dtype == torch.int64
        assert flat.tolist() == [int(number) for one in lists for number in one]
        return
    place = data.draw(st.integers(0, len(lists) - 1))
    lists[place].append(other)
    if isinstance(other, int):
        with pytest.raises(ValueError, match="x holds an integer that does not fit into int64"):
            flatten("x", lists)
    else:
        assert torch.equal(
            flatten("x", lists),
            torch.tensor([float(number) for one in lists for number in one]),
        )


def test_arrow_tables_are_rows_of_examples():
    pyarrow = pytest.importorskip("pyarrow")
    rows = [
        {"input_ids": [1, 2, 3], "weights": [0.5, 1.0, 2.0]},
        {"input_ids": [4], "weights": [3.0]},
    ]
    expected = PackingCollator()(
        [{key: np.array(value) for key, value in row.items()} for row in rows]
    )
    table = pyarrow.Table.from_pylist(rows)
    chunked = pyarrow.concat_tables([table.slice(0, 1), table.slice(1, 1)])
    for features in (
        [table],
        [chunked],
        [table.slice(0, 1), table.slice(1, 1)],
        table.to_batches(),
    ):
        assert_same(PackingCollator()(features), expected)
    views = arrow_examples(table)
    assert not views[0]["input_ids"].flags.writeable and views[0]["input_ids"].base is not None
    with pytest.raises(
        ValueError, match=r"weights .*must hold one number per token|weights of example"
    ):
        PackingCollator()([pyarrow.table({"input_ids": [[1, 2]], "weights": [[1.0, None]]})])


def test_a_datasets_rows_in_every_format():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]], "text": ["a", "b"]}
    )
    expected = PackingCollator()(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    for kind in (None, "numpy", "torch", "arrow"):
        rows = data.with_format(kind)
        assert_same(PackingCollator()([rows[0], rows[1]]), expected)


def test_packs_stay_together_and_mix_with_examples():
    examples = make([3, 4, 2])
    for features in (
        [Pack(examples[:2]), examples[2], Pack([])],
        [Pack(examples[:2]), Pack(examples[2:])],
    ):
        columns, counts = columns_of(features)
        assert counts == [2, 1] and columns == {
            "input_ids": [example["input_ids"] for example in examples]
        }
    assert_same(PackingCollator()([Pack(examples[:2]), examples[2]]), PackingCollator()(examples))


def test_inputs_are_not_changed():
    for form in FORMS:
        examples = make([3, 4], form, labels=5)
        PackingCollator()(examples[:1])["labels"].zero_()
        PackingCollator(pad_to_multiple_of=8)(examples)["input_ids"].zero_()
        assert list(examples[0]["labels"]) == [5, 6, 7] and list(examples[0]["input_ids"]) == [
            0,
            1,
            2,
        ]


def test_an_empty_part_of_any_kind_is_nothing():
    for form in FORMS:
        values = [FORMS[form]([1, 2]), FORMS[form]([])]
        assert flatten("x", values).tolist() == [1, 2]
        assert flatten("x", [values[0], [], ()]).tolist() == [1, 2]


HUGE = np.broadcast_to(np.int64(1), (2**30,))  # no memory


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "got no examples"),
        ([Pack([])], "got no examples"),
        ([{"input_ids": [1]}, {"labels": [1]}], r"example 1 has no input_ids, only \['labels'\]"),
        (
            [{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}],
            "example 1 has the keys .*'labels'",
        ),
        ([{"input_ids": [1]}, {"input_ids": []}], "example 1 has no tokens"),
        ([{"input_ids": np.array([])}], "example 0 has no tokens"),
        (
            [{"input_ids": [1, 2], "attention_mask": [0, 0]}],
            "example 0 has no tokens: its attention_mask is all zeros",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [1, None]}],
            "attention_mask must hold one number per token",
        ),
        *[
            ([{"input_ids": [1, 2], key: value}], f"{key} must hold one number per token")
            for key in ("attention_mask", "position_ids", "seq_idx", "seq_lengths", "cu_seq_lens")
            for value in ([None, 1], ["a", 1], np.array(["a", "b"]))
        ],
        *[
            (
                [{"input_ids": [1, 2], "attention_mask": mask}],
                f"attention_mask must be 0 where a token is masked, .*, got {wrong}",
            )
            for mask, wrong in (
                ([-1, 1], -1),
                ([1, 0.5], 0.5),
                ([1, math.nan], math.nan),
                (torch.tensor([math.inf, 1.0]), math.inf),
            )
        ],
        (
            [Pack([{"input_ids": [1, 2], "attention_mask": ["a", 1]}])],
            "attention_mask must hold one number per token",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [1]}],
            "attention_mask of example 0 has length 1, its input_ids 2",
        ),
        (
            [{"input_ids": [1, 2], "labels": [1]}],
            "labels of example 0 has length 1, its input_ids 2",
        ),
        (
            [{"input_ids": [1, 2], "labels": 1}],
            "labels of example 0 must hold one number per token, got int 1",
        ),
        (
            [{"input_ids": [1, 2], "labels": torch.tensor(1)}],
            r"labels of example 0 must hold .*, got shape \(\)",
        ),
        (
            [{"input_ids": [1, 2], "labels": None}],
            "labels of example 0 must hold one number per token, got NoneType",
        ),
        (
            [{"input_ids": [1, 2], "labels": "ab"}],
            "labels of example 0 must hold one number per token, got str 'ab'",
        ),
        ([{"input_ids": [1, 2], "weights": [1.0]}], "weights of example 0 has length 1"),
        (
            [{"input_ids": [1, 2], "pixels": np.zeros((2, 3))}],
            r"pixels of example 0 must .* got shape \(2, 3\)",
        ),
        (
            [{"input_ids": "ab"}],
            "input_ids of example 0 must hold one number per token, got str 'ab'",
        ),
        ([{"input_ids": 5}], "input_ids of example 0 must hold one number per token, got int 5"),
        ([{"input_ids": ["a", "b"]}], "input_ids must hold one number per token"),
        ([{"input_ids": [[1], [2]]}], "input_ids must hold one number per token"),
        (
            [{"input_ids": np.array([[1], [2]])}],
            r"input_ids of example 0 must .* got shape \(2, 1\)",
        ),
        (
            [{"input_ids": np.array(["a"])}],
            "input_ids must hold one number per token, got the dtype <U1",
        ),
        ([{"input_ids": [2**63]}], "input_ids holds an integer that does not fit into int64"),
        (
            [{"input_ids": np.array([1, 2**63], np.uint64)}],
            "input_ids holds an integer that does not fit into int64",
        ),
        (
            [{"input_ids": torch.tensor([-1]).view(torch.uint64)}],
            "input_ids holds an integer that does not fit",
        ),
        (
            [{"input_ids": torch.ones(2, dtype=torch.int64, device="meta")}],
            "must be dense tensors .* on meta",
        ),
        (
            [{"input_ids": torch.tensor([1, 2]).to_sparse()}],
            "must be dense tensors .* torch.sparse_coo",
        ),
        (
            [{"input_ids": [1]}, {"input_ids": torch.ones(1, dtype=torch.int64, device="meta")}],
            "input_ids must be dense tensors",
        ),
        (
            [{"input_ids": [1], "weights": torch.ones(1, dtype=torch.complex64)}],
            "weights must be dense tensors",
        ),
        ([{"input_ids": [1.0, 2.0]}], "input_ids must be integers, got torch.float32"),
        (
            [{"input_ids": [1], "labels": np.array([1.0])}],
            "labels must be integers, got torch.float64",
        ),
        (
            [{"input_ids": HUGE}] * 2,
            "the 2 examples of the batch have 2147483648 input_ids, int32 boundaries count "
            "2147483647",
        ),
    ],
)
def test_bad_examples(examples, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator()(examples)


def test_padding_past_int32_is_refused():
    with pytest.raises(
        ValueError, match="2 rows of 1073741824 tokens are more than int32 boundaries can count"
    ):
        PackingCollator(rows=2, pad_to_multiple_of=2**30)([{"input_ids": [1]}, {"input_ids": [2]}])


def test_bad_feature():
    with pytest.raises(TypeError, match="dicts or packs, got list"):
        PackingCollator()([[1, 2]])
