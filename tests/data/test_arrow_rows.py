"""Rows of a datasets.Dataset read where they lie are those that the dataset gives."""

from __future__ import annotations

import numpy as np
import pytest

from fastft.data.arrow_rows import ArrowRows

datasets = pytest.importorskip("datasets")

LENGTHS = [3, 1, 0, 7, 2, 63, 4]


def plain():
    ids = [list(range(100 * row, 100 * row + length)) for row, length in enumerate(LENGTHS)]
    columns = {
        "input_ids": ids,
        "weights": [[0.5 * token for token in row] for row in ids],
        "gaps": [None if row == 3 else [row] for row in range(len(ids))],
        "holes": [[1, None] for _ in ids],
        "flags": [[True, False] for _ in ids],
        "text": [f"row {row}" for row in range(len(ids))],
        "label": list(range(len(ids))),
    }
    return datasets.Dataset.from_dict(columns)


DATASETS = {
    "plain": plain,
    "shuffled": lambda: plain().shuffle(seed=1),
    "selected": lambda: plain().select([5, 0, 3]),
    "a range": lambda: plain().select(range(2, 6)),
    "several files": lambda: datasets.concatenate_datasets(
        [plain(), plain().select([4, 1]), plain()]
    ),
    "shuffled, several files": lambda: datasets.concatenate_datasets([plain(), plain()]).shuffle(
        seed=3
    ),
    "columns": lambda: plain().with_format(columns=["input_ids", "label"]),
    "all columns": lambda: plain().with_format(columns=["input_ids"], output_all_columns=True),
    "int32": lambda: plain().cast_column("input_ids", datasets.Sequence(datasets.Value("int32"))),
    "large lists": lambda: plain().cast_column(
        "input_ids", datasets.LargeList(datasets.Value("int64"))
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_the_datasets(name, tmp_path):
    made = DATASETS[name]()
    made.save_to_disk(tmp_path)
    for dataset in (made, datasets.load_from_disk(tmp_path)):  # in memory, and mapped
        order = [len(dataset) - 1, 0, *range(len(dataset)), 0]
        for ours, theirs in zip(
            ArrowRows(dataset)(order), dataset.__getitems__(order), strict=True
        ):
            assert ours.keys() == theirs.keys()
            assert (
                isinstance(ours["input_ids"], np.ndarray) and not ours["input_ids"].flags.writeable
            )
            assert {
                key: list(v) if isinstance(v, np.ndarray) else v for key, v in ours.items()
            } == theirs


def test_no_rows():
    assert ArrowRows(plain())([]) == []
