"""Rows that another tool packed: each of their documents is a segment, by whichever column says
where they begin."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_examples import FORMS, assert_same, unpacked
from support.trainers import logged, quiet_arguments, tiny_llama
from support.versions import chosen_logits
from torch.utils.data import IterableDataset

from fastft.data.collator import PackingCollator
from fastft.data.pack import Pack
from fastft.data.packed import pack

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")


def runs(sizes: list[int], start: int = 0) -> list[int]:
    return [start + place for size in sizes for place in range(size)]


def numbers(sizes: list[int], first: int = 0) -> list[int]:
    return [first + number for number, size in enumerate(sizes) for _ in range(size)]


def borders(sizes: list[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


COLUMNS = {
    "position_ids": lambda sizes: {"position_ids": runs(sizes)},
    "seq_idx": lambda sizes: {"seq_idx": numbers(sizes)},
    "a mask that numbers": lambda sizes: {"attention_mask": numbers(sizes, 1)},
    "seq_lengths, as TRL": lambda sizes: {"seq_lengths": sizes},
    "cu_seq_lens": lambda sizes: {"cu_seq_lens": borders(sizes)},
    "cu_seqlens": lambda sizes: {"cu_seqlens": borders(sizes)},
    "as flash attention": lambda sizes: {
        "cu_seq_lens_q": borders(sizes),
        "cu_seq_lens_k": borders(sizes),
    },
    "all of them": lambda sizes: {
        "position_ids": runs(sizes),
        "seq_idx": numbers(sizes, 5),
        "seq_lengths": sizes,
        "attention_mask": [1] * sum(sizes),
    },
}


def documents(sizes: list[int]) -> list[dict[str, list[int]]]:
    """Documents of different tokens, with labels."""
    return [
        {"input_ids": list(range(100 * i, 100 * i + n)), "labels": list(range(50 + i, 50 + i + n))}
        for i, n in enumerate(sizes)
    ]


def rows_of(
    made: list[dict[str, list[int]]], per_row: int, column: str
) -> list[dict[str, list[int]]]:
    """The reference packer: `per_row` documents joined in each row, and the column that says where
    they begin."""
    rows = []
    for first in range(0, len(made), per_row):
        members = made[first : first + per_row]
        row: dict[str, Any] = {
            key: list(itertools.chain(*[one[key] for one in members])) for key in made[0]
        }
        rows.append(row | COLUMNS[column]([len(one["input_ids"]) for one in members]))
    return rows


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@settings(max_examples=80, deadline=None)
@given(SIZES, st.integers(1, 5), st.sampled_from(sorted(COLUMNS)), st.sampled_from(sorted(FORMS)))
def test_rows_of_another_packer_are_their_documents_one_by_one(sizes, per_row, column, form):
    made = documents(sizes)
    rows = [
        {key: FORMS[form](value) for key, value in row.items()}
        for row in rows_of(made, per_row, column)
    ]
    flattening = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )
    expected = {**flattening(made), "use_cache": False}
    assert_same(PackingCollator()(rows), expected)
    assert_same(PackingCollator()([Pack(rows[:1]), *rows[1:]]), expected)
    assert_same(PackingCollator(expand_on_device=True)(rows).to("cpu"), expected)


class Stream(IterableDataset):
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


KINDS = {
    "list": lambda rows: rows,
    "arrow": datasets.Dataset.from_list,
    "selected": lambda rows: datasets.Dataset.from_list(rows[::-1]).select(
        range(len(rows) - 1, -1, -1)
    ),
    "torch": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "stream": Stream,
}


def segments(packed: Any) -> list[list[int]]:
    """The tokens of every segment of all packs, sorted; positions begin anew in each."""
    found = []
    for one in packed:
        batch = PackingCollator()([one])
        assert unpacked(batch, "position_ids") == [
            list(range(n)) for n in batch["cu_seq_lens_q"].diff().tolist()
        ]
        assert all(labels[0] == -100 for labels in unpacked(batch, "labels"))
        found += unpacked(batch, "input_ids")
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", COLUMNS)
def test_rows_go_through_pack(kind, column):
    made = documents([3, 5, 1, 7, 2, 2, 9, 4, 1, 1, 6])
    rows = rows_of(made, 3, column)
    packed = pack(KINDS[kind](rows), 24)
    assert segments(packed) == sorted(document["input_ids"] for document in made)


@settings(max_examples=60, deadline=None)
@given(
    SIZES,
    st.integers(1, 5),
    st.sampled_from(sorted(COLUMNS)),
    st.integers(1, 20),
    st.sampled_from(["split", "truncate"]),
)
@pytest.mark.parametrize("kind", ["list", "arrow", "stream"])
def test_parts_of_rows_keep_their_documents_apart(
    kind, sizes, per_row, column, max_tokens, overlong
):
    made = documents(sizes)
    expected = []
    for first in range(0, len(made), per_row):
        tokens = [
            (number, token)
            for number in range(first, min(first + per_row, len(made)))
            for token in made[number]["input_ids"]
        ]
        for begin in range(0, len(tokens) if overlong == "split" else max_tokens, max_tokens):
            part = tokens[begin : begin + max_tokens]
            expected += [
                [token for _, token in group]
                for _, group in itertools.groupby(part, key=lambda pair: pair[0])
            ]
    packed = pack(KINDS[kind](rows_of(made, per_row, column)), max_tokens, overlong=overlong)
    assert segments(packed) == sorted(expected)


def test_what_is_masked_is_no_document():
    """Padding at both ends, whose positions are those that tokenizers give it; a document in two
    masked pieces."""
    row = {
        "input_ids": [0, 0, 11, 12, 13, 21, 22, 0, 0],
        "attention_mask": [0, 0, 1, 1, 1, 1, 1, 0, 0],
        "position_ids": [1, 1, 0, 1, 2, 0, 1, 1, 1],
    }
    expected = PackingCollator()([{"input_ids": [11, 12, 13]}, {"input_ids": [21, 22]}])
    assert_same(PackingCollator()([row]), expected)
    assert_same(PackingCollator()([pack([row], 9)[0]]), expected)
    lengths = {
        "input_ids": [11, 12, 0, 21, 22],
        "attention_mask": [1, 1, 0, 1, 1],
        "seq_lengths": [2, 3],
    }
    assert_same(
        PackingCollator()([lengths]),
        PackingCollator()([{"input_ids": [11, 12]}, {"input_ids": [21, 22]}]),
    )


def test_positions_of_one_document_change_nothing():
    examples = documents([3, 4])
    expected = PackingCollator(position_ids_start=2)(examples)
    for start in (0, 2):
        numbered = [
            {**one, "position_ids": runs([len(one["input_ids"])], start)} for one in examples
        ]
        assert_same(PackingCollator(position_ids_start=2)(numbered), expected)


@pytest.mark.parametrize("task", ["token_classification", "masked_lm"])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_label_of_a_document_stays(task, rows):
    made = documents([3, 5, 1, 7])
    collator = PackingCollator(task=task, rows=rows)
    packed = collator(rows_of(made, 2, "position_ids"))
    # a row of another packer stays whole in a row of the batch, as a pack does
    assert_same(packed, collator([Pack(made[:2]), Pack(made[2:])]))
    assert sorted(
        labels for labels in unpacked(packed, "labels") if set(labels) != {-100}
    ) == sorted(one["labels"] for one in made)


@chosen_logits
def test_a_supervised_batch_of_rows():
    made = documents([3, 2])
    collator = PackingCollator(supervised_only=True)
    assert_same(collator(rows_of(made, 2, "seq_idx")), collator(made))


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("sequence_classification", 1, "example 0 is 2 documents, .* has no label for each"),
        ("seq2seq", [1, 2], "example 0 is 2 documents, .* does not know which labels are whose"),
    ],
)
def test_labels_that_cannot_be_shared_out(task, labels, message):
    row = {"input_ids": [1, 2, 3, 4, 5], "position_ids": [0, 1, 0, 1, 2], "labels": labels}
    with pytest.raises(ValueError, match=message):
        PackingCollator(task=task, decoder_start_token_id=0)([row])
    with pytest.raises(
        ValueError,
        match="example 0 is 2 documents, packed by another tool, but has no label for each tok",
    ):
        PackingCollator(task=task, decoder_start_token_id=0)([pack([row], 8)[0]])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        # PoSE
        (
            "position_ids",
            [0, 1, 2, 100, 101, 102],
            "position_ids of example 1 are 100 after 2 at token 3",
        ),
        # a shared prefix
        ("position_ids", [0, 1, 2, 3, 2, 3], "position_ids of example 1 are 2 after 3 at token 4"),
        ("position_ids", [7, 8, 9, 10, 11, 12], "position_ids of example 1 begin at 7"),
        ("position_ids", [2, 3, 4, 2, 3, 4], "begin at 2; .* position_ids_start=2"),
        (
            "position_ids",
            [0, 1, 2, 3, 4],
            "position_ids of example 1 has length 5, its input_ids 6",
        ),
        ("position_ids", [0.0, 1, 2, 3, 4, 5], "position_ids must be integers"),
        (
            "position_ids",
            np.zeros((3, 6), int),
            r"position_ids of example 1 must hold one number per token, got shape",
        ),
        (
            "seq_lengths",
            [3, 4],
            r"seq_lengths of example 1 must be the lengths of its documents, .* got \[3, 4\]",
        ),
        ("seq_lengths", [-1, 7], "seq_lengths of example 1 must be the lengths"),
        ("cu_seq_lens", [0, 3], "cu_seq_lens of example 1 must be the borders, from 0"),
        ("cu_seq_lens", [1, 6], "cu_seq_lens of example 1 must be the borders, from 0"),
        ("cu_seq_lens_q", [0, 4, 3, 6], "cu_seq_lens_q of example 1 must be the borders"),
    ],
)
def test_what_says_nothing_of_documents_is_refused(column, value, message):
    good = {"position_ids": [0, 1], "seq_lengths": [2]}.get(column, [0, 2])
    with pytest.raises(ValueError, match=message):
        PackingCollator()(
            [{"input_ids": [1, 2], column: good}, {"input_ids": [1] * 6, column: value}]
        )


def test_positions_that_run_on_where_a_document_begins_are_refused():
    row = {"input_ids": [1] * 4, "position_ids": [0, 1, 2, 3], "seq_idx": [0, 0, 1, 1]}
    for features in ([row], pack([row], 4)):
        with pytest.raises(ValueError, match="position_ids of example 0 are 2 after 1 at token 2"):
            PackingCollator()(list(features))


def test_rows_that_trl_packed():
    data_utils = pytest.importorskip("trl.data_utils")
    made = documents([3, 5, 1, 7, 2, 2, 9, 4, 1, 1, 6])
    rows = data_utils.pack_dataset(datasets.Dataset.from_list(made), 12, "bfd")
    assert "seq_lengths" in rows.column_names
    assert segments(pack(rows, 24)) == sorted(document["input_ids"] for document in made)
    batch = PackingCollator()(list(rows))
    assert sorted(unpacked(batch, "input_ids")) == sorted(
        document["input_ids"] for document in made
    )


def llama() -> torch.nn.Module:
    return tiny_llama(attn_implementation="sdpa")


@pytest.mark.parametrize("packs", [False, True])
def test_trainer_keeps_documents_of_packed_rows_apart_as_stock_does(packs, tmp_path):
    draw = np.random.default_rng(0)
    made = [
        {"input_ids": ids, "labels": ids}
        for ids in (draw.integers(0, 97, n).tolist() for n in (5, 3, 9, 2, 6, 4))
    ]
    rows = rows_of(
        [{**one, "labels": [-100, *one["labels"][1:]]} for one in made], 2, "position_ids"
    )
    rows = datasets.Dataset.from_list(
        [{**row, "seq_idx": row["position_ids"], "source": "x"} for row in rows]
    )

    def losses(dataset: Any, collator: Any) -> list[float]:
        args = quiet_arguments(
            tmp_path,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            learning_rate=1e-2,
        )
        trainer = transformers.Trainer(
            model=llama(), args=args, train_dataset=dataset, data_collator=collator
        )
        trainer.train()
        return logged(trainer)

    stock = losses(rows.remove_columns("seq_idx"), transformers.default_data_collator)
    rows = rows.remove_columns("seq_idx")
    ours = losses(pack(rows, 11, window=1) if packs else rows, PackingCollator())
    np.testing.assert_allclose(ours, stock, rtol=1e-5)


def trl_losses(folder: str, rows: Any, collator: Any, **options: Any) -> list[float]:
    """The losses of TRL's trainer on rows that are prepared already."""
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="[PAD]", eos_token="[EOS]"
    )
    args = quiet_arguments(
        folder,
        trl.SFTConfig,
        bf16=False,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        max_steps=3,
        learning_rate=1e-2,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        **options,
    )
    trainer = trl.SFTTrainer(
        llama(), args=args, train_dataset=rows, data_collator=collator, processing_class=tokenizer
    )
    trainer.train()
    return logged(trainer)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
def test_packs_as_a_dataset_train_alike_in_trl(tmp_path):
    draw = np.random.default_rng(0)
    made = [
        {"input_ids": ids, "labels": ids}
        for ids in (draw.integers(2, 97, n).tolist() for n in (5, 3, 9, 2, 6, 4))
    ]
    rows = pack(made, 11).to_dataset()
    ours = trl_losses(str(tmp_path), rows, PackingCollator())
    theirs = trl_losses(str(tmp_path), rows, None, padding_free=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
