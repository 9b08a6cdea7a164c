"""Evaluation on two processes (gloo): every example once, in the dataset's order, or a sentence on
both.

All cases run in one pair of processes, because starting it costs more than the cases.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from support import processes
from support.evaluations import (
    MODELS,
    OPTIONS,
    assert_rows,
    assert_tokens,
    examples_for,
    pad,
    trainer_for,
)

import fastft
from fastft.data.collator import PackingCollator
from fastft.data.packed import pack

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
PROCESSES = 2
TOKEN_TASKS = [task for task in MODELS if task != "sequence_classification"]


@contextlib.contextmanager
def trainer(task: str, size: int, collator: PackingCollator, **options: Any) -> Iterator[Any]:
    """A trainer on this process, with packed sequences kept apart."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(PROCESSES)}
    # accelerate asks for them; the group is there
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with tempfile.TemporaryDirectory() as folder:
        made = trainer_for(task, folder, collator, size, **options)
        with fastft.packed_attention(made.model):
            yield made


def padded_examples():
    for task, size in zip(MODELS, (1, 2, 3, 4, 3), strict=True):
        collator = PackingCollator(task=task, pad_examples=True, **OPTIONS.get(task, {}))
        with trainer(task, size, collator) as made:
            assert_rows(task, made.predict(examples_for(task)))


def an_example_in_each_row():
    for task, size in zip(TOKEN_TASKS, (2, 3, 4, 2), strict=True):
        collator = PackingCollator(task=task, rows=size, **OPTIONS.get(task, {}))
        with trainer(task, size, collator) as made:
            assert_rows(task, made.predict(examples_for(task)))


def labelled_examples_in_one_row():
    task = "sequence_classification"
    for size in (1, 3, 8):
        with trainer(task, size, PackingCollator(task=task)) as made:
            ours = made.predict(examples_for(task))
            assert_rows(task, ours)
        with trainer(task, size, lambda rows: pad(task, rows), attention="sdpa") as made:
            stock = made.predict(examples_for(task))
        assert ours.metrics["test_loss"] == pytest.approx(
            stock.metrics["test_loss"], rel=1e-5, nan_ok=True
        )


def packs_of_labelled_examples_are_refused():
    task = "sequence_classification"
    stream = datasets.Dataset.from_list(examples_for(task)).to_iterable_dataset()
    options = {"accelerator_config": {"dispatch_batches": False}}
    for data in (examples_for(task), stream):
        with trainer(task, 2, PackingCollator(task=task), **options) as made:
            with pytest.raises(
                ValueError, match=r"from several processes, .*eval_dataset=packed.dataset"
            ):
                made.predict(pack(data, 16))
        dist.barrier()


def packs_that_are_as_many_as_the_ranks_take():
    """`balance` leaves accelerate nothing to repeat."""
    task = "token_classification"
    packed = pack(examples_for(task), 16, balance=2 * PROCESSES)
    with trainer(task, 2, PackingCollator(task=task)) as made:
        assert_tokens(task, made.predict(packed))


def a_pack_in_each_row():
    for task in ("causal_lm", "seq2seq"):
        packed = pack(examples_for(task), 16)
        assert len(packed) % (3 * PROCESSES)
        with trainer(task, 3, PackingCollator(task=task, rows=3, **OPTIONS.get(task, {}))) as made:
            assert_tokens(task, made.predict(packed))


class Words(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def repeated_examples_are_spoken_of():
    data = examples_for("causal_lm")
    for callback, collator, dataset, loud in (
        (fastft.PackingCallback, PackingCollator(), data, True),
        (fastft.FusedLossCallback, PackingCollator(), pack(data, 16), True),
        (fastft.PackingCallback, PackingCollator(rows=3), data, False),
        (fastft.PackingCallback, PackingCollator(), pack(data, 16, balance=6), False),
    ):
        words = Words()
        logger = logging.getLogger("transformers.fastft.integrations.rows_as_examples")
        logger.addHandler(words)
        with trainer("causal_lm", 3, collator, callbacks=[callback()]) as made:
            made.predict(dataset)
        logger.removeHandler(words)
        assert (
            any("predictions, and metrics computed from them" in text for text in words.said)
            == loud
        )


CASES = {
    case.__name__: case
    for case in (
        padded_examples,
        an_example_in_each_row,
        labelled_examples_in_one_row,
        packs_of_labelled_examples_are_refused,
        packs_that_are_as_many_as_the_ranks_take,
        a_pack_in_each_row,
        repeated_examples_are_spoken_of,
    )
}


@pytest.mark.parametrize("case", CASES)
def test_on_two_processes(case, tmp_path_factory):
    assert processes.run(__name__, PROCESSES, tmp_path_factory)[case] == [""] * PROCESSES
