"""What the host knows of boundaries on a device: by whichever way a batch gets there, and never
what is old."""

from __future__ import annotations

import copy
import functools
import gc
import types
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers
from support.device_mode import DeviceMode
from support.host_work import of_host
from support.packed_examples import make
from support.packed_models import ends
from torch import Tensor, nn
from torch.distributed.utils import _to_kwargs
from torch.utils.data import DataLoader

from fastft.attention.segments import segments_of
from fastft.data import host_boundaries
from fastft.data.collator import PackingCollator
from fastft.data.host_boundaries import known, note, on_host

SIZES, BOUNDS = [5, 9, 3, 12], [0, 5, 14, 17, 29]
KEYS = ("cu_seq_lens_q", "cu_seq_lens_k")


def by_trainer(batch: Any, device: Any) -> Any:
    """As accelerate's loader moves it, and as Trainer copies what it gets."""
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(device=device), is_deepspeed_enabled=False
    )
    trainer._prepare_input = functools.partial(transformers.Trainer._prepare_input, trainer)
    return trainer._prepare_input(accelerate.utils.send_to_device(batch, device))


def by_ddp(batch: Any, device: Any) -> Any:
    _, kwargs = _to_kwargs((), dict(batch.to(device)), device, False)
    return kwargs[0]


KEPT: dict[str, Callable[[Any, Any], Any]] = {
    "its own to": lambda batch, device: batch.to(device),
    "accelerate": lambda batch, device: accelerate.utils.send_to_device(
        batch, device, non_blocking=True
    ),
    "Trainer": by_trainer,
    "DistributedDataParallel": by_ddp,
    "pinned": lambda batch, device: batch.pin_memory().to(device, non_blocking=True),
    "moved twice": lambda batch, device: batch.to(device).to(device),
    "a plain dict of it": lambda batch, device: {**batch.to(device), "labels": None},
}
LOST: dict[str, Callable[[Any, Any], Any]] = {
    "one tensor after the other": lambda batch, device: {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    },
    "BatchEncoding": lambda batch, device: transformers.BatchEncoding(dict(batch)).to("cuda:0"),
    "clones of it": lambda batch, device: {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in batch.to(device).items()
    },
    "without the longest segment": lambda batch, device: {
        key: batch[key].to(device) for key in KEYS
    },
}


@pytest.mark.parametrize("expand_on_device", [False, True], ids=["whole", "flat"])
@pytest.mark.parametrize("name", KEPT)
def test_a_batch_takes_them_along(name: str, expand_on_device: bool) -> None:
    batch = PackingCollator(expand_on_device=expand_on_device)(make(SIZES))
    assert_taken_along(batch, KEPT[name])


@pytest.mark.parametrize("expand_on_device", [False, True], ids=["whole", "flat"])
def test_a_batch_of_a_worker_takes_them_along(expand_on_device: bool) -> None:
    collator = PackingCollator(expand_on_device=expand_on_device)
    loader = DataLoader(make(SIZES), batch_size=4, collate_fn=collator, num_workers=1)
    assert_taken_along(next(iter(loader)), KEPT["its own to"])


def assert_taken_along(batch: Any, move: Callable[[Any, Any], Any]) -> None:
    with DeviceMode() as mode:
        there = move(of_host(mode, batch), mode.device)
        assert there["cu_seq_lens_q"].is_cuda
        mode.waits.clear()
        segments = segments_of(nn.Module(), there)
        assert segments is not None and segments.alike
        assert (segments.bounds_q, segments.bounds_k, segments.max_seqlen_q) == (BOUNDS, BOUNDS, 12)
    assert mode.waits == []


@pytest.mark.parametrize("name", LOST)
def test_others_are_read_once_a_batch(name: str) -> None:
    batch = PackingCollator()(make(SIZES))
    with DeviceMode() as mode:
        there = LOST[name](of_host(mode, batch), mode.device)
        mode.waits.clear()
        for _ in range(3):  # layers
            segments = segments_of(nn.Module(), there)
            assert segments is not None and segments.alike
            assert (segments.bounds_q, segments.bounds_k, segments.max_seqlen_k) == (
                BOUNDS,
                BOUNDS,
                12,
            )
    assert len(mode.waits) == 1


def test_a_copied_batch_is_read_anew() -> None:
    batch = PackingCollator()(make(SIZES))
    batch["cu_seq_lens_q"].add_(1)
    moved = copy.deepcopy(batch.to("cpu"))
    moved["cu_seq_lens_q"].sub_(1)
    assert on_host(moved["cu_seq_lens_q"])[0].ends == BOUNDS


def test_pinned_boundaries_are_one_tensor_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning each key by itself would make two of one, of which attention knows nothing."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    batch = PackingCollator()(make(SIZES, labels=30))
    pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert type(pinned) is type(batch) and pinned.counted == batch.counted == 25
    assert pinned["cu_seq_lens_k"] is pinned["cu_seq_lens_q"] is not batch["cu_seq_lens_q"]
    assert pinned.to("cpu")["cu_seq_lens_k"] is pinned["cu_seq_lens_q"]


def test_an_encoder_and_a_decoder() -> None:
    examples, collator = (
        make([5, 3], labels=30),
        PackingCollator(task="seq2seq", decoder_start_token_id=0),
    )
    for expected, own in ((0, True), (1, False)):
        batch = collator(examples)
        with DeviceMode() as mode:
            of_host(mode, batch)
            there = (
                batch.to(mode.device)
                if own
                else LOST["one tensor after the other"](batch, mode.device)
            )
            mode.waits.clear()
            for is_decoder, causal in ((False, False), (True, True), (True, False)):
                module = nn.Module()
                module.is_decoder = is_decoder
                segments = segments_of(module, {**there, "is_causal": causal})
                assert segments is not None and segments.bounds_q == segments.bounds_k == [0, 5, 8]
        assert len(mode.waits) == expected


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "copy_": lambda cu: cu.copy_(torch.arange(5, device=cu.device)),
    "an element": lambda cu: cu[1:].fill_(7),
    "a view": lambda cu: cu.view(5)[1:3].add_(1),
    "data": lambda cu: setattr(cu, "data", cu + 1),
    "out": lambda cu: torch.add(cu, 1, out=cu),
}


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("name", WRITES)
def test_what_was_written_since_is_read_anew(name: str, where: str) -> None:
    cu = ends(SIZES)
    with DeviceMode() as mode:
        if where == "host":
            mode.host(cu)
        note(cu, BOUNDS)
        WRITES[name](cu)
        if where == "device":
            assert known(cu) is None
        read = on_host(cu)[0].ends
    assert read == cu.tolist() != BOUNDS


def test_numpy_writes_to_the_hosts_boundaries() -> None:
    cu = ends(SIZES)
    assert on_host(cu)[0].ends == BOUNDS
    cu.numpy()[2] = 15
    assert on_host(cu)[0].ends == [0, 5, 15, 17, 29]


def test_inference_mode_counts_no_writes() -> None:
    with torch.inference_mode():
        cu = ends(SIZES)
        with DeviceMode() as mode:
            note(cu, BOUNDS)
            assert known(cu) is None
            assert on_host(cu)[0].ends == BOUNDS and len(mode.waits) == 1
        assert on_host(cu)[0].ends == BOUNDS


def test_what_was_made_of_them_is_kept_as_long_as_they_are() -> None:
    cu = ends(SIZES)
    first = on_host(cu)[0]
    first.made["something"] = 1
    assert on_host(cu)[0] is first and first.longest == 12
    cu += 0
    assert on_host(cu)[0] is first  # the same numbers
    with DeviceMode():
        there = note(cu, BOUNDS)
        assert there is known(cu) is on_host(cu)[0] and there.made == {}
        cu += 0
        assert known(cu) is None


def test_notes_end_with_their_tensors() -> None:
    gc.collect()
    before = len(host_boundaries._notes)
    batch = PackingCollator()(make(SIZES))
    segments = segments_of(nn.Module(), batch)
    assert (
        segments is not None
        and segments.made is not None
        and segments.on_device(torch.device("meta"))
    )
    assert len(host_boundaries._notes) == before + 1
    del batch, segments
    gc.collect()
    assert len(host_boundaries._notes) == before


def test_no_segments() -> None:
    assert on_host(torch.zeros(1, dtype=torch.int32))[0].longest == 0 and on_host() == []
