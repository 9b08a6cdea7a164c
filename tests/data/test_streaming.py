from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trainers import quiet_arguments, tiny_llama
from torch.utils.data import DataLoader, IterableDataset

from fastft.data.collator import PackingCollator
from fastft.data.packed import pack
from fastft.data.streaming import PackedStream

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

LENGTHS = np.random.default_rng(0).integers(1, 50, 90).tolist()


def examples(lengths: list[int]) -> list[dict]:
    return [{"input_ids": [i] * length, "id": i} for i, length in enumerate(lengths)]


class Stream(IterableDataset):
    """As torch has it: no state, no epochs."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Stateful(Stream):
    """In torchdata's convention."""

    position, start = 0, 0

    def __iter__(self):
        self.position, self.start = self.start, 0
        while self.position < len(self.rows):
            self.position += 1
            yield self.rows[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.start = state_dict["position"]


KINDS = {
    "torch": Stream,
    "stateful": Stateful,
    "datasets": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3),
    "datasets numpy": lambda rows: (
        datasets.Dataset.from_list(rows).to_iterable_dataset().with_format("numpy")
    ),
}


def stream(kind: str = "torch", lengths: list[int] = LENGTHS, **options) -> PackedStream:
    return pack(KINDS[kind](examples(lengths)), 64, **{"open_packs": 4, **options})


def ids(packs) -> list[list[int]]:
    return [[int(example["id"]) for example in one.examples] for one in packs]


def pickled(one):
    return pickle.loads(pickle.dumps(one))


def online_best_fit(lengths: list[int], open_packs: int, max_sequences: int) -> list[list[int]]:
    """The oracle: looks at every open pack for every example."""
    waiting: list[list[int]] = []
    done = []

    def room(pack: list[int]) -> int:
        return 64 - sum(lengths[i] for i in pack)

    for i, length in enumerate(lengths):
        fits = [pack for pack in waiting if room(pack) >= length]
        if fits:
            chosen = min(fits, key=room)
        else:
            if len(waiting) == open_packs:
                fullest = min(waiting, key=room)
                waiting.remove(fullest)
                done.append(fullest)
            chosen = []
            waiting.append(chosen)
        chosen.append(i)
        if room(chosen) == 0 or len(chosen) == max_sequences:
            waiting.remove(chosen)
            done.append(chosen)
    return done + sorted(waiting, key=room)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(1, 6), st.integers(1, 80))
def test_equals_the_oracle(lengths, open_packs, max_sequences):
    packed = pack(Stream(examples(lengths)), 64, open_packs=open_packs, max_sequences=max_sequences)
    assert ids(packed) == online_best_fit(lengths, open_packs, max_sequences)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=40), st.sampled_from(["truncate", "split", "drop"]))
def test_overlong_examples(lengths, overlong):
    found: dict[int, int] = {}
    for one in stream(lengths=lengths, overlong=overlong):
        assert sum(len(example["input_ids"]) for example in one.examples) <= 64
        for example in one.examples:
            found[example["id"]] = found.get(example["id"], 0) + len(example["input_ids"])
    kept = {
        "truncate": lambda n: min(n, 64),
        "split": lambda n: n,
        "drop": lambda n: n * (n <= 64),
    }[overlong]
    assert found == {i: kept(n) for i, n in enumerate(lengths) if kept(n)}


def test_many_open_packs_fill_well():
    lengths = np.clip(np.random.default_rng(0).lognormal(3, 0.9, 2000), 1, 64).astype(int).tolist()
    assert len(list(stream(lengths=lengths, open_packs=32))) <= 1.01 * sum(lengths) / 64 + 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlong", ["drop", "split"])
def test_resumes_anywhere(kind, overlong):
    # several packs are ready at once after the long one
    lengths = [*LENGTHS[:20], 300, *LENGTHS[20:40]]
    reference = stream(kind, lengths, overlong=overlong)
    reference.set_epoch(2)  # datasets shuffles its shards by the epoch
    whole = ids(reference)
    for stop in range(len(whole) + 1):
        begun = stream(kind, lengths, overlong=overlong)
        begun.set_epoch(2)
        iterator = iter(begun)
        first = [next(iterator) for _ in range(stop)]
        state = pickle.loads(pickle.dumps(begun.state_dict()))
        resumed = stream(kind, lengths, overlong=overlong)
        resumed.load_state_dict(state)
        assert resumed.state_dict() is state
        resumed.set_epoch(2)
        again = []
        for one in resumed:  # a state taken after resuming is as good
            again.append(one)
            if len(again) == 2:
                twice = stream(kind, lengths, overlong=overlong)
                twice.load_state_dict(resumed.state_dict())
                assert ids(first + again) + ids(twice) == whole
        assert ids(first + again) == whole
        assert ids(resumed) == whole  # the next epoch begins at the beginning


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_resumed_iteration_that_was_left_begins_at_the_beginning(kind):
    packed = stream(kind)
    next(iter(packed))
    packed.load_state_dict(pickle.loads(pickle.dumps(packed.state_dict())))
    next(iter(packed))
    assert ids(packed) == ids(stream(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("travels", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_begins_anew_and_its_state_is_where_the_stream_stood(kind, travels):
    packed, whole = stream(kind), ids(stream(kind))
    iterator = iter(packed)
    first = ids(next(iterator) for _ in range(3))
    copied = travels(packed)
    between = ids(next(iterator) for _ in range(2))
    state = pickled(copied.state_dict())
    # of a shallow copy the dataset is this one's
    rest = ids(iterator) if travels is copy.copy else None
    assert ids(copied) == whole
    copied.load_state_dict(state)
    assert ids(copied) == whole[3:]
    assert first + between + (ids(iterator) if rest is None else rest) == whole
    assert copied._epoch.is_shared()  # persistent workers follow the epochs


def test_a_copy_goes_on_from_a_state_that_was_loaded():
    packed, whole = stream(), ids(stream())
    next(iter(packed))
    packed.load_state_dict(packed.state_dict())
    assert ids(copy.deepcopy(packed)) == ids(packed) == whole[1:]


BEGUN = {"epoch": 0, "seen": 0, "source": None, "ready": [], "open": []}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "state_dict must be a dict, got NoneType"),
        ({}, ValueError, r"it lacks \['epoch', 'open', 'ready', 'seen', 'source'\]"),
        ({**BEGUN, "epoch": 2**70}, ValueError, r"state_dict\['epoch'\] must be an integer"),
        ({**BEGUN, "seen": -1}, ValueError, r"state_dict\['seen'\] must be an integer"),
        (
            {**BEGUN, "open": 3},
            ValueError,
            r"state_dict\['open'\] must be lists of examples, got 3",
        ),
        ({**BEGUN, "ready": [[{}]]}, ValueError, r"state_dict\['ready'\] must be lists"),
    ],
)
def test_bad_states(state, error, message):
    packed = stream()
    with pytest.raises(error, match=message):
        packed.load_state_dict(state)
    assert ids(packed) == ids(stream())


@pytest.mark.parametrize("epoch", [1.5, -1, 2**63])
def test_bad_epochs(epoch):
    with pytest.raises(ValueError, match=r"epoch must be an integer in \[0, 2\^63\), got "):
        stream().set_epoch(epoch)


def test_state_of_another_epoch_is_not_resumed():
    begun, resumed = stream("datasets"), stream("datasets")
    next(iter(begun))
    resumed.load_state_dict(begun.state_dict())
    resumed.set_epoch(1)
    assert ids(resumed) == ids(stream("datasets"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_after_the_epoch_was_set_is_that_epochs_beginning(kind):
    packed = stream(kind)
    before = ids(packed)
    packed.set_epoch(1)
    resumed = stream(kind)
    resumed.load_state_dict(pickle.loads(pickle.dumps(packed.state_dict())))
    assert sorted(ids(resumed)) == sorted(before)  # all of them


def test_epoch_reaches_the_dataset():
    shuffled = (
        datasets.Dataset.from_list(examples(LENGTHS))
        .to_iterable_dataset()
        .shuffle(seed=0, buffer_size=100)
    )
    packed = pack(shuffled, 64)
    orders = []
    for epoch in (0, 1, 0):
        packed.set_epoch(epoch)
        orders.append(ids(packed))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_workers_pack_what_their_copy_yields(kind):
    loader = DataLoader(stream(kind), batch_size=None, collate_fn=lambda one: one, num_workers=2)
    seen = sorted(i for one in ids(loader) for i in one)
    # datasets shards itself, a dataset of torch is asked to
    assert seen == sorted([*range(len(LENGTHS))] * (1 if kind == "datasets" else 2))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"input_ids": [1]}, {"input_ids": []}], {}, "example 1 has no tokens"),
        ([{"text": "a"}], {}, "example 0 has no input_ids"),
        ([{"input_ids": [1] * 65}], {}, "example 0 has 65 tokens, more than max_tokens=64"),
        ([], {"seed": 1}, "seed is only for a map-style dataset, got 1"),
        ([], {"balance": 2}, "balance is only for a map-style dataset, got 2"),
        ([], {"open_packs": 0}, "open_packs must be an integer .* or None, got 0"),
        ([], {"overlong": "wrap"}, "overlong must be one of"),
    ],
)
def test_bad_input(rows, options, message):
    with pytest.raises(ValueError, match=message):
        list(pack(Stream(rows), 64, **options))


def test_open_packs_are_only_for_streams():
    with pytest.raises(ValueError, match="open_packs is only for an iterable dataset, got 8"):
        pack(examples([1]), 64, open_packs=8)


def trainer_on(packed, tmp_path, **options) -> transformers.Trainer:
    args = quiet_arguments(tmp_path, max_steps=3, per_device_train_batch_size=2, **options)
    return transformers.Trainer(
        model=tiny_llama(), args=args, train_dataset=packed, data_collator=PackingCollator()
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_dispatched_batches_are_refused(workers, tmp_path):
    with pytest.raises(ValueError, match="'dispatch_batches': False"):
        trainer_on(stream("datasets"), tmp_path, dataloader_num_workers=workers).train()
    assert (
        trainer_on(stream("datasets"), tmp_path, accelerator_config={"dispatch_batches": False})
        .train()
        .metrics
    )


def test_dispatch_of_a_map_style_dataset_is_refused(tmp_path):
    options = {
        "accelerator_config": {"dispatch_batches": True},
        "train_sampling_strategy": "sequential",
    }
    with pytest.raises(ValueError, match="each rank has to load its own batches"):
        trainer_on(pack(examples(LENGTHS), 64), tmp_path, **options).train()


def test_dispatching_would_have_cut_the_boundaries():
    accelerate = pytest.importorskip("accelerate")
    batch = PackingCollator()(examples([3, 4]))
    sliced = accelerate.utils.slice_tensors(batch, slice(0, 1))
    assert torch.equal(sliced["input_ids"], batch["input_ids"]) and sliced[
        "cu_seq_lens_q"
    ].tolist() == [0]
