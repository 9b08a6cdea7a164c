"""What one training step of each piece costs the host: operations, kernel launches, waits, calls of Python.

The steps run on torch's device "meta", which has shapes and no memory, as if it were a GPU that the
CUDA library serves: so they have the sizes of real models, take the code's path for devices, and an
attempt to read a number raises.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fastft
from fastft import _native, ops

DEVICE = torch.device("meta")
_FASTFT = os.path.dirname(fastft.__file__) + os.sep
# what our operators launch, as tests/test_kernels_table.py counts it with the library itself; adamw_bind comes once
LAUNCHES = {"cross_entropy_rows": 1, "packed_boundaries": 2}
_WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
_NO_LAUNCH = ("empty", "detach", "lift_fresh", "promote_types", "_local_scalar_dense")


@dataclass
class HostCounts:
    """Of one step.

    Attributes:
        operations: calls that torch dispatches, views and allocations among them.
        launches: those that launch a kernel on the device, at least one each; our kernels' own number.
        waits: where the host waits for the device: a number is read, memory that is not pinned is copied.
        python: functions called by fastft's own code, Python's and C's.
        names: how often each operation was called.
    """

    operations: int
    launches: int
    waits: int
    python: int
    names: Counter[str]


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "fastft":
            return self._own(name, func, args, kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self.names[name] += 1
        if name in _WAITS and _on_device(args):
            self.waits += 1
        result = func(*args, **kwargs)
        moved = _on_device((args, kwargs)) != _on_device(result)
        if name in ("_to_copy", "copy_") and moved and not kwargs.get("non_blocking", args[-1] is True):
            self.waits += 1
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        silent = views or any(part in name for part in _NO_LAUNCH)
        if not silent and _on_device(result if isinstance(result, Tensor) else args):
            self.launches += 1
        return result

    def _own(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        operator = ops.OPERATORS.get(name)
        if operator is not None and not operator.engines:  # plain torch around a kernel
            with self:
                return operator.reference(*args, **kwargs)
        self.names[name] += 1
        if name == "grad_norm_squared_":
            self.launches += -(-len(args[1]) // 190) + 1
        elif name == "adamw_bound_":
            self.launches += 1 + -(-8 * len(args[0]) // 4000)  # gradients lie elsewhere than before
            return 0
        elif name == "adamw_bind":
            return 1
        else:
            self.launches += LAUNCHES[name]
        return func(*args, **kwargs)


def _on_device(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device == DEVICE and value.numel() > 0
    if isinstance(value, dict):
        return any(map(_on_device, value.values()))
    return isinstance(value, list | tuple) and any(map(_on_device, value))


@contextlib.contextmanager
def as_gpu() -> Iterator[None]:
    """Within, the CUDA library serves `DEVICE`, which has autocast switched off, as torch does not know it there."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def no_autocast(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == DEVICE.type else autocast(device, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        patch = mock.patch
        stack.enter_context(patch.dict(ops.DEVICES, cuda=DEVICE.type))
        stack.enter_context(patch.object(_native, "cuda_unusable", lambda index: None))
        stack.enter_context(patch.object(torch, "autocast", no_autocast))
        stack.enter_context(
            patch.object(torch, "is_autocast_enabled", lambda kind: kind != DEVICE.type and enabled(kind))
        )
        yield


def counted(step: Callable[[], Any]) -> HostCounts:
    """The counts of a step's second run; the first imports, plans and fills caches."""
    calls = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        caller = frame.f_back if event == "call" else frame
        mine = frame.f_code.co_filename == __file__
        if event in ("call", "c_call") and caller and not mine:
            calls += caller.f_code.co_filename.startswith(_FASTFT)

    with as_gpu():
        with _Watch():
            step()
        with _Watch() as watch:
            sys.setprofile(profile)
            try:
                step()
            finally:
                sys.setprofile(None)
    return HostCounts(sum(watch.names.values()), watch.launches, watch.waits, calls, watch.names)


def fused_loss(tokens: int, classes: int) -> Callable[[], Any]:
    """linear_cross_entropy over bf16 states and head, forward and backward, in chunks of 1024 rows."""

    def step() -> None:
        states = torch.empty(tokens, 1024, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        head = torch.empty(classes, 1024, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        target = torch.empty(tokens, dtype=torch.int64, device=DEVICE)
        fastft.linear_cross_entropy(states, head, target, chunk_rows=1024).backward()

    return step


def loss_of_logits(tokens: int, classes: int) -> Callable[[], Any]:
    """cross_entropy over bf16 logits, forward and backward."""

    def step() -> None:
        logits = torch.empty(tokens, classes, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        fastft.cross_entropy(logits, torch.empty(tokens, dtype=torch.int64, device=DEVICE)).backward()

    return step


def optimizer(tensors: int, classes: int, clipped: bool) -> Callable[[], Any]:
    """A step of AdamW over bf16 tensors, the first an embedding of `classes` rows, with new gradients."""
    shapes = [(classes, 64), *[(64, 64)] * (tensors - 1)]
    params = [Parameter(torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)) for shape in shapes]
    adamw = fastft.AdamW(params, max_grad_norm=1.0 if clipped else None)
    grads = itertools.cycle([[torch.empty_like(param) for param in params] for _ in range(2)])

    def step() -> None:
        for param, grad in zip(params, next(grads), strict=True):
            param.grad = grad
        adamw.step()

    return step


def collation(tokens: int) -> Callable[[], Any]:
    """A batch of 16 examples with `tokens` in all, collated and unpacked on the device."""
    collator = fastft.PackingCollator(expand_on_device=True)
    examples = [{"input_ids": torch.zeros(tokens // 16, dtype=torch.int64)} for _ in range(16)]

    def step() -> None:
        collator(examples).to(DEVICE, non_blocking=True)

    return step


STEPS: dict[str, Callable[[], Callable[[], Any]]] = {
    "linear_cross_entropy, 1 chunk": lambda: fused_loss(1024, 128_256),
    "linear_cross_entropy, 4 chunks": lambda: fused_loss(4096, 128_256),
    "cross_entropy over logits": lambda: loss_of_logits(8192, 128_256),
    "AdamW, 400 tensors": lambda: optimizer(400, 128_256, False),
    "AdamW, 400 tensors, clipped": lambda: optimizer(400, 128_256, True),
    "collation of 16 examples": lambda: collation(65_536),
}
