"""What our operators and steps cost the host, for the table of kernels.

Launches and waits of an operator are those of the CUDA library's own code, under the fake runtime;
operations and waits of a step are counted in host_work.py, the functions that fastft's Python calls
in it here.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import fastft
from fastft.optim.adamw_update import Rounding
from support import segment_problems
from support.device_mode import DeviceMode
from support.kernel_counts import adamw_arguments
from support.ptx import Gpu, cuda_operators
from support.row_problems import CASES, draw, run

_FASTFT = os.path.dirname(fastft.__file__) + os.sep


def versions() -> str:
    """What the counts of a step depend on."""
    return (
        f"torch {torch.__version__.partition('+')[0]}, Python "
        f"{'.'.join(platform.python_version_tuple()[:2])}"
    )


def python_calls(prepare: Callable[[DeviceMode], Callable[[], Any]]) -> int:
    """How many functions, Python's and C's, fastft's code calls in the second run of a step of
    host_work.py."""
    calls = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        caller = frame.f_back if event == "call" else frame if event == "c_call" else None
        of_torch_or_tests = event == "call" and not frame.f_code.co_filename.startswith(_FASTFT)
        if caller is not None and not of_torch_or_tests:
            calls += caller.f_code.co_filename.startswith(_FASTFT)

    with DeviceMode() as mode:
        step = prepare(mode)
        step()
        sys.setprofile(profile)
        try:
            step()
        finally:
            sys.setprofile(None)
    return calls


def operator_calls(tensors: int = 400) -> dict[str, dict[str, int]]:
    """Launches and waits of a call of each operator, those of AdamW over so many tensors."""
    found: dict[str, dict[str, int]] = {}
    with cuda_operators(90, checks=False) as gpu:

        def count(name: str, call: Callable[[], Any]) -> Any:
            launches, waits = len(gpu.launches), gpu.waits.total()
            result = call()
            found[name] = {
                "launches": len(gpu.launches) - launches,
                "waits": gpu.waits.total() - waits,
            }
            return result

        plain = draw(CASES["plain"], 5, 63, torch.bfloat16)
        count("cross_entropy_rows", lambda: run(gpu.ops.cross_entropy_rows, plain))
        packed = segment_problems.draw([3, 60])
        count("packed_boundaries", lambda: segment_problems.run(gpu.ops.packed_boundaries, *packed))
        gradients, scale = [torch.zeros(9) for _ in range(3)], torch.ones(())
        count("scale_gradients_, 3 tensors", lambda: gpu.ops.scale_gradients_(gradients, scale))
        _of_adamw(gpu, tensors, count)
    return found


def _of_adamw(gpu: Gpu, tensors: int, count: Callable[[str, Callable[[], Any]], Any]) -> None:
    params, grads, *states, table, hyper, factor, seed = adamw_arguments(
        Rounding.EXACT, torch.float32, tensors, 8
    )
    total = torch.zeros((), dtype=torch.float64)
    count(
        f"grad_norm_squared_, {tensors} tensors", lambda: gpu.ops.grad_norm_squared_(total, grads)
    )
    bound = count(
        f"adamw_bind, {tensors} tensors", lambda: gpu.ops.adamw_bind(params, *states, table)
    )

    def step(grads: list[Tensor]) -> None:
        assert gpu.ops.adamw_bound_(grads, hyper, factor, seed, bound) == 0

    name = f"adamw_bound_, {tensors} tensors"
    count(f"{name}, the first step", lambda: step(grads))
    others = [grad.clone() for grad in grads]
    count(f"{name}, gradients in new places", lambda: step(others))
    count(f"{name}, gradients where they were", lambda: step(others))
    gpu.release(bound)
