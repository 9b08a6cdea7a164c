from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numerics import assert_no_worse, terms_of
from support.trainers import logged, quiet_arguments, tiny_llama
from torch.utils.data import DataLoader, Dataset

from fastft.data.collator import PackingCollator
from fastft.data.pack import Pack
from fastft.data.packed import PackedDataset, pack, scan_lengths

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

SIZES = [5, 17, 3, 30, 8, 1, 12, 22, 9, 4, 31]


def make(sizes: list[int] = SIZES, masked: int = 0) -> list[dict]:
    """Examples of the given sizes; the first `masked` labels of each are ignored."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, size in enumerate(sizes):
        ids = torch.randint(0, 97, (size,), generator=generator).tolist()
        made.append(
            {
                "input_ids": ids,
                "labels": [-100] * min(masked, size - 1) + ids[min(masked, size - 1) :],
                "id": i,
            }
        )
    return made


class TorchDataset(Dataset):
    def __init__(self, examples: list[dict]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return {
            "input_ids": torch.tensor(self.examples[index]["input_ids"]),
            "id": self.examples[index]["id"],
        }


def from_list(examples: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(examples)


KINDS = {
    "list": lambda examples: examples,
    "torch": TorchDataset,
    "datasets": from_list,
    "datasets numpy": lambda examples: from_list(examples).with_format("numpy"),
    "datasets torch": lambda examples: from_list(examples).with_format(
        "torch", columns=["input_ids"]
    ),
    "datasets arrow slices": lambda examples: datasets.concatenate_datasets(
        [from_list(examples[:4]), from_list(examples[4:])]
    ),
    "datasets arrow": lambda examples: from_list(examples).with_format("arrow"),
    "datasets pandas": lambda examples: from_list(examples).with_format("pandas"),
    "datasets sliced": lambda examples: from_list([*make([3, 4]), *examples, *make([2])]).select(
        range(2, 2 + len(examples))
    ),
    "datasets shuffled chunks": lambda examples: datasets.concatenate_datasets(
        [from_list(examples[5:]), from_list(examples[:5])]
    ).select([*range(len(examples) - 5, len(examples)), *range(len(examples) - 5)]),
    "datasets large lists": lambda examples: from_list(examples).cast_column(
        "input_ids", datasets.LargeList(datasets.Value("int32"))
    ),
    "datasets selected": lambda examples: from_list(examples[::-1]).select(
        range(len(examples) - 1, -1, -1)
    ),
    "datasets fixed": lambda examples: from_list(examples).with_transform(lambda batch: batch),
}


def tokens(packed: PackedDataset, p: int) -> list[list[int]]:
    return [list(map(int, example["input_ids"])) for example in packed[p].examples]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dataset_gives_the_same_packs(kind):
    examples = make()
    packed = pack(KINDS[kind](examples), 32)
    assert len(packed) == 5
    assert scan_lengths(packed.dataset).tolist() == SIZES
    seen = []
    for p in range(len(packed)):
        assert [examples[i]["input_ids"] for i in packed.plan[p].tolist()] == tokens(packed, p)
        assert sum(map(len, tokens(packed, p))) <= 32
        seen += packed.plan[p].tolist()
    assert sorted(seen) == list(range(len(SIZES)))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_single_items_agree(kind):
    packed = pack(KINDS[kind](make()), 32, seed=1)
    collator = PackingCollator()
    for p, one in zip([-5, 2, 4], packed.__getitems__([-5, 2, 4]), strict=True):
        assert collator([one])["input_ids"].tolist() == collator([packed[p]])["input_ids"].tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.integers(1, 40),
    st.sampled_from(["truncate", "split", "drop"]),
    st.none() | st.integers(1, 4),
    st.sampled_from(["list", "datasets"]),
)
def test_overlong_examples(sizes, max_tokens, overlong, max_sequences, kind):
    if overlong == "drop" and min(sizes) > max_tokens:
        return
    examples = make(sizes)
    packed = pack(KINDS[kind](examples), max_tokens, overlong=overlong, max_sequences=max_sequences)
    pieces: dict[int, list[int]] = {}
    for p in range(len(packed)):
        parts = packed[p].examples
        assert sum(len(part["input_ids"]) for part in parts) <= max_tokens
        assert max_sequences is None or len(parts) <= max_sequences
    entries = [part for p in range(len(packed)) for part in packed[p].examples]
    for entry in packed.plan.starts.argsort(stable=True).tolist():
        part = entries[entry]
        pieces.setdefault(int(part["id"]), []).extend(part["input_ids"])
        assert list(part["labels"]) == list(part["input_ids"])
    kept = {
        "truncate": lambda ids: ids[:max_tokens],
        "split": lambda ids: ids,
        "drop": lambda ids: ids if len(ids) <= max_tokens else None,
    }[overlong]
    expected = {e["id"]: kept(e["input_ids"]) for e in examples if kept(e["input_ids"]) is not None}
    assert pieces == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dataset_is_cut(kind):
    """Where examples are too long one is looked at, whose images could not be cut."""
    packed = pack(KINDS[kind](make()), 8, overlong="split")
    found = [len(example["input_ids"]) for one in packed for example in one.examples]
    expected = [min(8, size - start) for size in SIZES for start in range(0, size, 8)]
    assert sorted(found) == sorted(expected)


def test_a_piece_of_padding_alone_is_refused_at_once():
    row = {"input_ids": [5, 6, 7, 0, 0, 0, 0, 0], "attention_mask": [1, 1, 1] + [0] * 5}
    with pytest.raises(ValueError, match=r"has 8 tokens .* keeps 3, max_tokens is 4.*padding=F"):
        pack([row] * 3, 4, overlong="split")
    assert len(pack([row] * 3, 4, overlong="truncate")) == 3
    assert len(pack([row] * 3, 6, overlong="truncate")) == 3
    two = {"input_ids": [5] * 8, "attention_mask": [1] * 5 + [0] * 3}
    assert [len(one.joined()["input_ids"]) for one in pack([two], 4, overlong="split")] == [4, 1]


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_a_batch_of_one_is_not_taken_for_one_token(kind):
    rows = [{"input_ids": [[4, 5, 6]], "labels": [[4, 5, 6]]}]
    (one,) = pack(KINDS[kind](rows), 1, overlong="truncate")
    assert [list(value) for value in one.examples[0].values()] == [[4], [4]]


def test_no_packs_are_a_batch_of_none():
    assert pack(make(), 32, seed=0).__getitems__([]) == []


def test_length_column_spares_the_tokens_of_a_transform():
    dataset = from_list([{"text": "x" * size, "length": size} for size in SIZES])

    def tokenize(batch):
        return {"input_ids": [list(map(ord, text)) for text in batch["text"]]}

    packed = pack(dataset.with_transform(tokenize), 32)
    assert len(packed) == 5 and sum(map(len, tokens(packed, 0))) == 32
    packed.dataset = dataset.with_transform(
        lambda batch: {"input_ids": [[1] for _ in batch["text"]]}
    )
    with pytest.raises(
        ValueError, match=r"example \d+ has 1 tokens, but had \d+ when it was packed"
    ):
        packed.__getitems__(range(len(packed)))


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_length_column_is_believed_and_checked(kind):
    rows = [{**example, "tokens": len(example["input_ids"])} for example in make()]
    assert tokens(pack(KINDS[kind](rows), 32, length_column="tokens"), 0) == tokens(
        pack(KINDS[kind](rows), 32), 0
    )
    rows[4]["tokens"] = 6
    packed = pack(KINDS[kind](rows), 32, length_column="tokens")
    with pytest.raises(ValueError, match="example 4 has 8 tokens, but had 6 when it was packed"):
        list(packed)
    with pytest.raises(ValueError, match=r"length_column='size' is none|example 0 has no 'size'"):
        pack(KINDS[kind](rows), 32, length_column="size")


def test_offsets_are_read_without_the_tokens(monkeypatch):
    dataset = from_list(make()).shuffle(seed=0)
    expected = [len(ids) for ids in dataset["input_ids"]]
    monkeypatch.setattr(type(dataset), "__getitem__", lambda *_: pytest.fail("a row was read"))
    assert scan_lengths(dataset).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "workers", "context"),
    [
        *((kind, workers, "fork") for kind in ("list", "torch", "datasets") for workers in (0, 2)),
        ("datasets", 1, "spawn"),
    ],
)
def test_data_loader(kind, workers, context):
    packed = pack(KINDS[kind](make()), 32, seed=3)
    options = {"multiprocessing_context": context, "persistent_workers": True} if workers else {}
    loader = DataLoader(
        packed, batch_size=2, collate_fn=PackingCollator(), num_workers=workers, **options
    )
    epochs = []
    for epoch in range(2):
        packed.set_epoch(epoch)
        epochs.append([batch["input_ids"][0].tolist() for batch in loader])
        expected = [[*map(int, itertools.chain(*tokens(packed, p)))] for p in range(5)]
        expected = [expected[0] + expected[1], expected[2] + expected[3], expected[4]]
        assert epochs[-1] == expected
    assert epochs[0] != epochs[1]


def test_an_epoch_is_a_count_and_of_one_dataset():
    packed = pack(make(), 32, seed=np.int64(1))
    first = [tokens(packed, p) for p in range(len(packed))]
    for other in (copy.copy(packed), copy.deepcopy(packed)):
        other.set_epoch(np.int64(3))
        assert [tokens(other, p) for p in range(len(other))] != first
    assert [tokens(packed, p) for p in range(len(packed))] == first
    for epoch in (1.5, -1, 2**63):
        with pytest.raises(ValueError, match=r"epoch must be an integer in \[0, 2\^63\), got "):
            packed.set_epoch(epoch)


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.5, "x"])
def test_a_seed_is_checked_at_the_door(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\^63\) or None, got "):
        pack(make(), 32, seed=seed)


@pytest.mark.parametrize("kind", ["list", "torch", "datasets"])
def test_pickles(kind):
    packed = pack(KINDS[kind](make()), 32)
    again = pickle.loads(pickle.dumps(packed))
    assert [tokens(again, p) for p in range(len(again))] == [
        tokens(packed, p) for p in range(len(packed))
    ]


def test_arrow_columns_that_are_no_number_lists():
    rows = [
        {"input_ids": [1, 2], "weights": [0.5, None], "text": "a"},
        {"input_ids": [3], "weights": [2.0], "text": None},
    ]
    examples = pack(from_list(rows), 8)[0].examples
    assert [list(example["input_ids"]) for example in examples] == [[1, 2], [3]]
    assert [(example["weights"], example["text"]) for example in examples] == [
        ([0.5, None], "a"),
        ([2.0], None),
    ]


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_packs_become_rows_of_a_dataset(kind, monkeypatch):
    monkeypatch.setattr("fastft.data.packed.ROWS_OF_A_TABLE", 2)
    examples = [{**one, "weights": [0.5] * len(one["input_ids"]), "text": "x"} for one in make()]
    examples[0]["input_ids"][0] = 96
    packed = pack(KINDS[kind](examples), 32)
    rows = packed.to_dataset()
    assert isinstance(rows, datasets.Dataset) and len(rows) == len(packed)
    assert rows.column_names == ["input_ids", "labels", "weights", "seq_lengths"]
    for p, row in enumerate(rows):
        members = [examples[i] for i in packed.plan[p].tolist()]
        for key in ("input_ids", "labels", "weights"):
            assert row[key] == list(itertools.chain(*[one[key] for one in members]))
        assert row["seq_lengths"] == [len(one["input_ids"]) for one in members]


def test_what_is_masked_is_not_in_the_rows_of_a_dataset():
    examples = [
        {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]},
        {"input_ids": [7], "attention_mask": [1]},
    ]
    assert pack(examples, 4).to_dataset()[0] == {"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}


def test_is_a_sequence():
    packed = pack(make(), 32)
    assert (
        isinstance(packed, Dataset)
        and isinstance(packed[0], Pack)
        and len(list(packed)) == len(packed)
    )
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"pack {index} of a plan with 5 packs"):
            packed[index]


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "dataset is empty"),
        ([{"text": "a"}], ValueError, "example 0 has no input_ids"),
        ([{"input_ids": [1]}, {"input_ids": []}], ValueError, "example 1 has no tokens"),
        (
            [{"input_ids": [1]}, {"input_ids": [1] * 33}],
            ValueError,
            "example 1 has 33 tokens, more than max_tokens=32",
        ),
        (
            iter(make()),
            TypeError,
            "pack needs a map-style dataset, with __len__ and __getitem__, or an iterable one",
        ),
        ({"train": make()}, TypeError, "got dict"),
        (from_list([{"text": "a"}]), ValueError, "example 0 has no input_ids"),
        (
            from_list([{"input_ids": 3}]),
            ValueError,
            "input_ids must be lists of tokens, the dataset's are int",
        ),
        (
            from_list([{"input_ids": [1]}, {"input_ids": None}]),
            ValueError,
            "example 1 has no tokens",
        ),
        (
            from_list(make()).with_format("numpy", columns=["labels"]),
            ValueError,
            r"no input_ids to pack, only \['labels",
        ),
        ([{"input_ids": 3}], ValueError, "example 0 has no input_ids to pack"),
        (datasets.DatasetDict(train=from_list(make())), TypeError, "got DatasetDict"),
    ],
)
def test_bad_datasets(dataset, error, message):
    with pytest.raises(error, match=message):
        pack(dataset, 32)


def llama(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return tiny_llama(num_hidden_layers=2, attn_implementation="sdpa").to(dtype)


def separately(
    model: torch.nn.Module, examples: list[dict]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The token-weighted mean loss over examples run alone, and its gradients."""
    model.zero_grad()
    batches = [
        {key: torch.tensor(np.array([e[key]])) for key in ("input_ids", "labels")} for e in examples
    ]
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    losses = [
        model(**batch, num_items_in_batch=count).loss
        for batch in batches
        if batch["labels"].numel() > 1
    ]
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("packs", [1, 2, 5])
def test_packed_batch_equals_examples_run_alone(packs, multiple):
    model = llama()
    packed = pack(from_list(make(masked=3)), 32)
    fetched = packed.__getitems__(range(packs))
    truth, true_gradients = separately(
        llama(torch.float64), [e for one in fetched for e in one.examples]
    )
    loss, gradients = separately(model, [e for one in fetched for e in one.examples])
    model.zero_grad()
    batch = PackingCollator(pad_to_multiple_of=multiple)(fetched)
    ours = model(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss
    ours.backward()
    terms = terms_of(model, batch["labels"].numel())
    assert_no_worse(ours.detach(), loss, truth, terms=terms)
    for p, plain, exact in zip(model.parameters(), gradients, true_gradients, strict=True):
        assert_no_worse(p.grad, plain, exact, terms=terms)


@pytest.mark.parametrize("kind", ["list", "torch", "datasets"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_trainer_trains_on_packs(kind, batch_size, tmp_path):
    model = llama()
    examples = make()
    packed = pack(KINDS[kind](examples), 32)
    args = quiet_arguments(
        tmp_path,
        per_device_train_batch_size=batch_size,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
    )
    reference = copy.deepcopy(model)
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=packed, data_collator=PackingCollator()
    )
    trainer.train()
    losses = logged(trainer)
    expected = []
    for first in range(0, len(packed), batch_size):
        groups = [
            packed.plan[p].tolist() for p in range(first, min(first + batch_size, len(packed)))
        ]
        loss, gradients = separately(reference, [examples[i] for group in groups for i in group])
        expected.append(loss.item())
        with torch.no_grad():
            for p, gradient in zip(reference.parameters(), gradients, strict=True):
                p.sub_(gradient, alpha=1e-2)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_trainer_evaluates_on_packs(tmp_path):
    model = llama()
    args = quiet_arguments(tmp_path, per_device_eval_batch_size=1)
    trainer = transformers.Trainer(
        model=model, args=args, eval_dataset=pack(make(), 512), data_collator=PackingCollator()
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        separately(model, make())[0].item(), rel=1e-5
    )


def test_transformers_flattening_is_told_which_collator_packs_need():
    collate = pytest.importorskip("transformers").DataCollatorWithFlattening()
    with pytest.raises(TypeError, match=r"data_collator=fastft\.PackingCollator\(\)"):
        collate([pack(make(), 64)[0]])
