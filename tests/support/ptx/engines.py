"""An operator as the CUDA or the Triton engine computes it, run as PTX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from fastft.ops import OPERATORS
from fastft.optim import adamw_update
from fastft.optim.adamw_part import Part
from support.ptx import cuda
from support.ptx.cuda import Gpu, tensors_in
from support.ptx.lanes import Launch


class Engine(NamedTuple):
    """`cuda` or `triton` on a chip, such as ("cuda", 90)."""

    name: str
    chip: int

    def __str__(self) -> str:
        return f"{self.name}-sm_{self.chip}"


ENGINES = [Engine(name, chip) for name in ("cuda", "triton") for chip in cuda.CAPABILITIES]


@contextlib.contextmanager
def operator(
    engine: Engine, name: str, **options: Any
) -> Iterator[tuple[Callable[..., Any], list[Launch]]]:
    """The operator `name` and the list of its launches; skips the test where the engine cannot be
    compiled.

    Triton kernels may touch every tensor among the arguments: some find their addresses in a table.
    """
    if engine.name == "cuda":
        require_cuda()
        with cuda.cuda_operators(engine.chip, **options) as gpu:
            yield getattr(gpu.ops, name), gpu.launches
        return
    pytest.importorskip("triton")
    from support.ptx.triton_launches import triton_as_ptx

    wrapper = OPERATORS[name]._triton_function()
    launches: list[Launch] = []

    def call(*arguments: Any) -> None:
        with triton_as_ptx(engine.chip, memory=list(tensors_in(arguments)), **options) as of_call:
            wrapper(*arguments)
        launches.extend(of_call)

    yield call, launches


def require_cuda() -> None:
    """Skips the test where the CUDA kernels cannot be compiled."""
    if cuda.missing():
        pytest.skip(f"the CUDA kernels: {cuda.missing()}")


@contextlib.contextmanager
def cuda_for_cpp(gpu: Gpu) -> Iterator[None]:
    """Within it `AdamW(impl="cpp")` steps with the CUDA kernels, on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fastft, "adamw_bind", gpu.ops.adamw_bind)
        patch.setattr(torch.ops.fastft, "adamw_bound_", gpu.ops.adamw_bound_)
        patch.setattr(torch.ops.fastft, "adamw_written", lambda sums, bound: None)
        patch.setattr(Part, "takes_norms", False)
        patch.setattr(adamw_update, "_release", lambda bound, kind: gpu.release(bound))
        yield


@contextlib.contextmanager
def adamw_by(engine: Engine, **options: Any) -> Iterator[list[Launch]]:
    """Within it AdamW steps with the kernels of `engine` where no engine has bound its tensors (see
    `unbound`)."""
    with (
        operator(engine, "adamw_", **options) as (update, launches),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(OPERATORS["adamw_"], "implementation", lambda impl, device, *tensors: update)
        yield launches


def unbound(training: Any) -> Any:
    """A Training that has taken a step, so that each of the next ones asks for its operator."""
    for part in training.optimizer._plan.parts:
        part.binding = None
    return training
