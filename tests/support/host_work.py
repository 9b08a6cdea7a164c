"""What one training step of each piece costs the host on a GPU, counted without one: operations,
and waits.

    for name, work in host_work().items():
        print(name, work.operations, work.launches, work.waits)

An operation is what torch dispatches, forward and backward; views and empty tensors are operations
that launch nothing. An operator of fastft's that has an engine is one operation. The device is
`DeviceMode`'s; the engines are the CPU's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastft
from fastft import ops
from fastft.attention.attention_tiles import AttentionCall
from fastft.attention.segment_attention import ATTENTION, segment_attention
from fastft.attention.segments import segments_of
from fastft.data.collator import PackingCollator
from support import flash_kernels
from support.device_mode import DeviceMode
from support.packed_examples import make

TENSORS = 400
_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_NO_WORK = {"lift_fresh", "_record_function_enter_new", "_record_function_exit"}


class Work(NamedTuple):
    """Of one step: how many operations, how many of them launch something, and where the host
    waits."""

    operations: int
    launches: int
    waits: list[Any]


@contextlib.contextmanager
def stand_ins(native: bool = True) -> Iterator[None]:
    """What only a GPU computes runs in plain torch; with `native`, CUDA's engines are the CPU's."""
    of_any_device = AttentionCall.generator
    with pytest.MonkeyPatch.context() as patch:
        flash_kernels.install(patch)
        on_cpu = lambda call, device: of_any_device(call, torch.device("cpu"))  # noqa: E731
        patch.setattr(AttentionCall, "generator", on_cpu)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(ops, "capability", lambda device: (9, 0))
        patch.setitem(ATTENTION.table, "flash_cuda", ops.Engine(("cuda",)))
        if native:
            patch.setitem(ops.ENGINES, "cuda", ops.Engine(("cuda",)))
            patch.setitem(ops.LIBRARIES, "cuda", "cpu")
        yield


def of_host(mode: DeviceMode, batch: Any) -> Any:
    """A batch, or a FlatBatch, that was made before the mode began, as the host's."""
    held = batch if isinstance(batch, dict) else {"integers": batch.integers, **batch.others}
    for value in held.values():
        if isinstance(value, Tensor):
            mode.host(value)
    return batch


def work_of(prepare: Callable[[DeviceMode], Callable[[], Any]], before: int = 1) -> Work:
    """The work of what `prepare` returns, called once more after `before` times."""
    with DeviceMode() as mode:
        step = prepare(mode)
        for _ in range(before):
            step()
        mode.waits.clear()
        mode.dispatched.clear()
        step()
        launches = sum(
            count for (func, of_host), count in mode.dispatched.items() if _launches(func, of_host)
        )
        return Work(sum(mode.dispatched.values()), launches, list(mode.waits))


def _launches(func: Any, of_host: bool) -> bool:
    name = func.overloadpacket.__name__
    if of_host and name != "clone":  # which is how DeviceMode copies to the device
        return False
    return not (getattr(func, "is_view", False) or name in _ALLOCATE or name in _NO_WORK)


def loss(tokens: int = 64, classes: int = 97) -> Callable[[DeviceMode], Callable[[], Any]]:
    """Cross-entropy over hidden states, forward and backward."""

    def prepare(mode: DeviceMode) -> Callable[[], Any]:
        x, head = (
            torch.randn(rows, 32, device=mode.device).requires_grad_() for rows in (tokens, classes)
        )
        target = torch.randint(classes, (tokens,), device=mode.device)
        return lambda: fastft.linear_cross_entropy(x, head, target).backward()

    return prepare


def adamw(
    tensors: int = TENSORS,
    numel: int = 640,
    clip_at_step: bool = False,
    scaler: bool = False,
    present: bool = True,
    **options: Any,
) -> Callable[[DeviceMode], Callable[[], Any]]:
    """A step of AdamW over fp32 and bf16 parameters in two groups, as Trainer makes them.

    With `present=False` one of them has a gradient at every other step alone, as an expert that no
    token chose.
    """

    def prepare(mode: DeviceMode) -> Callable[[], Any]:
        dtypes = (torch.float32, torch.bfloat16)
        params = [
            torch.zeros(5, numel // 5, device=mode.device, dtype=dtypes[i % 2])
            for i in range(tensors)
        ]
        for param in params:
            param.requires_grad_().grad = torch.ones_like(param)
        groups = [
            {"params": params[::2], "weight_decay": 0.1},
            {"params": params[1::2], "weight_decay": 0.0},
        ]
        optimizer = fastft.AdamW(groups, **options)

        last = params[-1].grad

        def step() -> None:
            if not present:
                params[-1].grad = None if params[-1].grad is last else last
            if scaler:
                optimizer.grad_scale = torch.full((1,), 2.0, device=mode.device)
                optimizer.found_inf = torch.zeros(1, device=mode.device)
            if clip_at_step:
                optimizer.clip_at_step([param.grad for param in (*params[::2], *params[1::2])], 1.0)
            optimizer.step()

        return step

    return prepare


def attention(
    length: int = 64, rows: int = 1, packed: bool = True, impl: str = "auto", **options: Any
) -> Callable[[DeviceMode], Callable[[], Any]]:
    """One layer over a packed batch that has been through a layer before, forward and backward."""

    def prepare(mode: DeviceMode) -> Callable[[], Any]:
        batch = PackingCollator(rows=rows)(
            make([length // 4, length // 2, length // 8, length // 8] * rows)
        )
        there = of_host(mode, batch).to(mode.device)
        heads = [(rows, length, count, 8) for count in (4, 2, 2)]
        q, k, v = (
            torch.zeros(*shape, device=mode.device, dtype=torch.bfloat16).requires_grad_()
            for shape in heads
        )
        sinks = torch.zeros(4, device=mode.device) if options.get("sinks") else None
        upstream = torch.ones(rows, length, 4, 8, device=mode.device, dtype=torch.bfloat16)
        rule = {"causal": True, **options, "sinks": sinks, "impl": impl}

        def step() -> None:
            segments = segments_of(nn.Module(), there)
            assert segments is not None
            segment_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), segments, **rule
            ).backward(upstream)

        return step

    return prepare


def batch(tokens: int = 64, **options: Any) -> Callable[[DeviceMode], Callable[[], Any]]:
    """A pinned batch on its way to the device."""

    def prepare(mode: DeviceMode) -> Callable[[], Any]:
        made = PackingCollator(**options)(make([tokens // 2, tokens // 4, tokens // 4], labels=30))
        pinned = of_host(mode, made).pin_memory()
        return lambda: pinned.to(mode.device, non_blocking=True)

    return prepare


PIECES: dict[str, Callable[[DeviceMode], Callable[[], Any]]] = {
    "linear_cross_entropy, forward and backward": loss(),
    f"AdamW, {TENSORS} tensors": adamw(),
    f"AdamW, {TENSORS} tensors, max_grad_norm": adamw(max_grad_norm=1.0),
    f"AdamW, {TENSORS} tensors, clip_at_step": adamw(clip_at_step=True),
    f"AdamW, {TENSORS} tensors, GradScaler": adamw(scaler=True),
    f"AdamW, {TENSORS} tensors, others than before": adamw(present=False),
    f"AdamW, {TENSORS} tensors, capturable": adamw(capturable=True),
    f"AdamW, {TENSORS} tensors, capturable, GradScaler, max_grad_norm": adamw(
        capturable=True, scaler=True, max_grad_norm=1.0
    ),
    "attention, a layer, forward and backward": attention(),
    "attention, a layer, with a window": attention(window=16),
    "attention, a layer, with chunks": attention(chunk=16),
    "attention, a layer, with sinks": attention(sinks=True),
    "batch to its device": batch(),
    "batch to its device, expand_on_device": batch(expand_on_device=True),
}


def host_work() -> dict[str, Work]:
    """The work of each piece, by name."""
    with stand_ins():
        return {name: work_of(prepare) for name, prepare in PIECES.items()}
