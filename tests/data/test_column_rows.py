"""Rows that are joined where they lie in an Arrow column make the batches that lists make."""

from __future__ import annotations

import copy
import itertools
import pickle
from array import array

import numpy as np
import pytest
import torch
from support.packed_examples import assert_same
from torch.utils.data import DataLoader

import fastft
from fastft.data import column_rows
from fastft.data.arrow_rows import fetcher
from fastft.data.collator import PackingCollator
from fastft.data.column_rows import ColumnRows, ListColumn, chained
from fastft.data.columns import flatten

datasets = pytest.importorskip("datasets")

LENGTHS = [3, 63, 2, 507, 4, 8, 17, 5]
DTYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
OTHERS = ["uint64", "float16", "float32", "float64"]
collator = PackingCollator()


@pytest.fixture(params=["native", "python"])
def joiner(request, monkeypatch):
    """The native library joins rows, or numpy does without it."""
    if request.param == "python":
        monkeypatch.setattr(column_rows, "_joiner", lambda: None)
    elif column_rows._joiner() is None:
        pytest.skip("there is no native library here")
    return request.param == "native"


def rows_of(lengths=LENGTHS, **others):
    """Examples with numbers below zero in `labels`, and other columns of a function of a token's
    place."""
    return [
        {
            "input_ids": [(100 * row + place) % 120 for place in range(length)],
            "labels": [-100 if place < 2 else -place for place in range(length)],
            **{key: [make(row, place) for place in range(length)] for key, make in others.items()},
        }
        for row, length in enumerate(lengths)
    ]


def pieces(rows):
    """A column of several chunks."""
    made = [datasets.Dataset.from_list(part) for part in (rows[:3], rows[3:4], rows[4:])]
    return datasets.concatenate_datasets(made)


FORMS = {
    "one chunk": datasets.Dataset.from_list,
    "several chunks": pieces,
    "chosen": lambda rows: datasets.Dataset.from_list([*rows, rows[0]][::-1]).select(
        range(len(rows), 0, -1)
    ),
    "chosen of several": lambda rows: pieces(rows[::-1]).select(range(len(rows) - 1, -1, -1)),
    "torch": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "part": lambda rows: datasets.Dataset(
        datasets.Dataset.from_list([rows[0], *rows, rows[0]]).data.table.slice(1, len(rows))
    ),
}


def batches(rows, dataset, collate=collator):
    """The batches of all packs, of a dataset and of the lists in it."""
    made = [fastft.pack(data, 600, seed=1) for data in (dataset, rows)]
    return [collate(packs.__getitems__(range(len(packs)))) for packs in made]


def held(packs):
    return packs.__getitems__([0])[0]["input_ids"].held


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_those_of_lists(form, joiner):
    dataset = FORMS[form](rows_of())
    assert isinstance(held(fastft.pack(dataset, 600)), ColumnRows) == joiner
    for options in ({}, {"rows": 2}, {"pad_to_multiple_of": 64}, {"expand_on_device": True}):
        collate = PackingCollator(**options)
        ours, other = batches(rows_of(), dataset, lambda packs, c=collate: c(packs).to("cpu"))
        assert_same(ours, other)


@pytest.mark.usefixtures("joiner")
def test_rows_of_one_token_and_packs_of_one_row():
    rows = rows_of([1, 63, 507, 1])
    assert_same(*batches(rows, pieces(rows)))


@pytest.mark.parametrize("dtype", [*DTYPES, *OTHERS])
@pytest.mark.parametrize("lists", [datasets.Sequence, datasets.LargeList])
def test_every_kind_of_numbers(dtype, lists, joiner):
    least = 0 if dtype.startswith("uint") else -3
    rows = rows_of(weights=lambda row, place: least + (place + row) % 100)
    for form in ("one chunk", "several chunks"):
        dataset = FORMS[form](rows).cast_column("weights", lists(datasets.Value(dtype)))
        packs = fastft.pack(dataset, 600)
        (pack,) = packs.__getitems__([0])
        assert isinstance(pack["weights"].held, ColumnRows) == (joiner and dtype in DTYPES)
        assert pack.examples[0]["weights"].dtype == dtype
        ours, other = batches(rows, dataset)
        wanted = getattr(torch, dtype) if "float" in dtype else torch.int64
        assert ours["weights"].dtype == wanted
        assert_same(ours, {**other, "weights": other["weights"].to(wanted)})


def test_numbers_at_the_ends_of_their_kind(joiner):
    import pyarrow

    for dtype in DTYPES:
        ends = np.iinfo(dtype)
        rows = [[int(ends.min)], [], [int(ends.max), 0, int(ends.min)], [int(ends.max)]]
        kind = pyarrow.list_(pyarrow.from_numpy_dtype(dtype))
        column = pyarrow.chunked_array([rows[:1], rows[1:1], rows[1:3], rows[3:]], kind)
        values = fetcher(column)(array("q", [3, 0, 1, 2]))
        assert isinstance(values, ColumnRows) == joiner
        flat = flatten("x", values)
        assert flat.dtype == torch.int64
        assert flat.tolist() == [number for row in (3, 0, 1, 2) for number in rows[row]]
        assert flatten("x", values[1:1]).tolist() == []
    wide = pyarrow.chunked_array([[[2**63]]], pyarrow.list_(pyarrow.uint64()))
    with pytest.raises(ValueError, match="x holds an integer that does not fit into int64"):
        flatten("x", fetcher(wide)(array("q", [0])))


@pytest.mark.usefixtures("joiner")
@pytest.mark.parametrize("masked", [0, 3], ids=["nothing masked", "masked"])
@pytest.mark.parametrize("form", ["one chunk", "several chunks"])
def test_attention_masks(form, masked):
    rows = rows_of(attention_mask=lambda row, place: int(not masked or place % masked != 1))
    dataset = FORMS[form](rows)
    assert_same(*batches(rows, dataset))
    ours, other = (fastft.pack(data, 600).to_dataset() for data in (dataset, rows))
    assert ours.to_list() == other.to_list()


@pytest.mark.usefixtures("joiner")
def test_a_pack_joins_its_row_twice_alike():
    rows = rows_of(attention_mask=lambda row, place: int(place != 1))
    for pack in fastft.pack(datasets.Dataset.from_list(rows), 600):
        assert_same(pack.joined(), pack.joined())


@pytest.mark.usefixtures("joiner")
def test_documents_that_another_tool_packed():
    rows = rows_of(position_ids=lambda row, place: place % 3)
    assert_same(*batches(rows, datasets.Dataset.from_list(rows)))


@pytest.mark.usefixtures("joiner")
def test_what_is_written_to_a_pack_is_in_its_batch():
    rows, changed = rows_of(), rows_of()
    packs = fastft.pack(datasets.Dataset.from_list(rows), 600, seed=1)
    first = packs[0]
    assert len(first["labels"]) == sum(map(len, first["labels"].values))
    place = first["labels"].values[0].tolist(), first["input_ids"].values[0].tolist()
    row = [one["input_ids"] for one in rows].index(place[1])
    changed[row]["labels"] = first["labels"].values[0] = [7] * len(place[0])
    wanted = fastft.pack(changed, 600, seed=1)[0]
    assert_same(collator([first]), collator([wanted]))
    first["labels"].values = wanted["labels"].values[::-1]
    wanted["labels"].values.reverse()
    if len({*map(len, wanted["labels"].values)}) == 1:
        assert_same(collator([first]), collator([wanted]))
    assert [*map(list, first["labels"].values)] == wanted["labels"].values


@pytest.mark.usefixtures("joiner")
def test_packs_beside_dicts_and_packs_of_another_dataset():
    rows, others = rows_of(), rows_of([9, 2, 33])
    ours = [fastft.pack(datasets.Dataset.from_list(data), 600) for data in (rows, others)]
    theirs = [fastft.pack(data, 600) for data in (rows, others)]
    for features in (
        lambda packs: [packs[0][0], packs[1][0], packs[0][1]],
        lambda packs: [packs[0][0], others[0]],
        lambda packs: [others[0], *packs[1].__getitems__([0])],
    ):
        assert_same(collator(features(ours)), collator(features(theirs)))


@pytest.mark.usefixtures("joiner")
def test_a_pack_that_loses_a_key():
    rows = rows_of(weights=lambda row, place: place)
    ours, theirs = (fastft.pack(data, 600) for data in (datasets.Dataset.from_list(rows), rows))
    kept = ("input_ids", "weights")
    left = [[{key: pack[key] for key in kept} for pack in packs] for packs in (ours, theirs)]
    assert_same(*map(collator, left))
    assert_same(*map(collator, [pickle.loads(pickle.dumps(left[0])), left[1]]))


@pytest.mark.usefixtures("joiner")
@pytest.mark.parametrize(
    "travel", [copy.copy, copy.deepcopy, lambda one: pickle.loads(dumped(one))]
)
def test_copies(travel):
    rows = rows_of()
    packs, wanted = (fastft.pack(data, 600) for data in (datasets.Dataset.from_list(rows), rows))
    first, expected = packs[0], collator([wanted[0]])
    assert_same(collator([travel(first)]), expected)
    assert_same(collator([{key: travel(values) for key, values in first.items()}]), expected)
    assert_same(collator([travel(packs)[0]]), expected)
    values = packs[0]["input_ids"].held
    assert [*map(list, travel(values))] == [*map(list, values)]
    assert_same(collator([first]), expected)


def dumped(one) -> bytes:
    """A pickle, without the numbers of rows that are not in it."""
    made = pickle.dumps(one)
    assert isinstance(one, fastft.data.packed.PackedDataset) or len(made) < 16_000
    return made


def test_a_loader_with_workers():
    rows = rows_of()
    loaders = [
        DataLoader(fastft.pack(data, 600), batch_size=2, collate_fn=collator, num_workers=workers)
        for data, workers in ((pieces(rows), 1), (rows, 0))
    ]
    for ours, other in zip(*loaders, strict=True):
        assert_same(ours, other)


def test_rows_are_as_the_list_of_their_views():
    if column_rows._joiner() is None:
        pytest.skip("there is no native library here")
    column = FORMS["several chunks"](rows_of()).data.table.column("input_ids")
    rows = [7, 3, 0, 4, 3]
    values = fetcher(column)(array("q", rows))
    wanted = [column[row].as_py() for row in rows]
    assert len(values) == len(rows) and values.lengths == [*map(len, wanted)]
    assert [view.tolist() for view in values] == wanted
    assert not any(view.flags.writeable for view in values)
    for place in (0, 4, -1, -5):
        assert values[place].tolist() == wanted[place]
    for place in (slice(1, 3), slice(None, None, -1), slice(-2, None), slice(4, 1)):
        assert [view.tolist() for view in values[place]] == wanted[place]
        assert flatten("x", values[place]).tolist() == [*itertools.chain(*wanted[place])]
    for place in (5, -6):
        with pytest.raises(IndexError):
            values[place]
    whole = chained([values[:2], values[2:]])
    assert isinstance(whole, ColumnRows) and whole.lengths == values.lengths
    assert isinstance(chained([values, [[1]]]), list)


@pytest.mark.parametrize("wide", [np.int32, np.int64])
@pytest.mark.parametrize(
    "offsets", [[0, 2, 9], [0, -1, 2], [-2, 0, 3], [0, 3, 1], [0, 2, 2**31 - 1], [7, 7, 8]]
)
def test_offsets_of_a_damaged_file_are_an_error(offsets, wide):
    if column_rows._joiner() is None:
        pytest.skip("there is no native library here")
    sound = np.arange(3), np.array([0, 1, 3], wide)
    for chunks, rows in (
        ([(np.arange(5), np.array(offsets, wide))], [0, 1]),
        ([sound, (np.arange(5), np.array(offsets, wide))], [0, 2, 3, 1]),
    ):
        values = ListColumn(chunks).fetch(array("q", rows))
        with pytest.raises(ValueError, match="lie outside of the column's memory"):
            values.joined()


def test_numbers_that_are_not_aligned_are_views():
    numbers = np.frombuffer(b"-" + np.arange(5).tobytes(), np.int64, offset=1)
    values = ListColumn([(numbers, np.array([0, 2, 5]))]).fetch(array("q", [1, 0]))
    assert isinstance(values, list) and flatten("x", values).tolist() == [2, 3, 4, 0, 1]


def test_the_native_function_reads_no_row_that_is_not_there():
    join = column_rows._joiner()
    if join is None:
        pytest.skip("there is no native library here")
    column = ListColumn([(np.arange(5), np.array([0, 2, 5])), (np.arange(2), np.array([0, 2]))])
    for rows, room, written in (
        ([0, 2], 4, 4),
        ([0, 2], 5, 4),
        ([0, 3], 4, -1),
        ([-1], 4, -1),
        ([0, 1], 4, -1),
        ([], 0, 0),
    ):
        out, asked = torch.full((6,), -7), array("q", rows)
        assert join(column.address, *asked.buffer_info(), out.data_ptr(), room) == written
        assert out[room:].tolist() == [-7] * (6 - room)
