"""`group=`: a loss whose classes are spread over processes, every option, against float64.

The processes are threads of this one, with torch's process group for that. Values and the gradients
of each shard are at most twice as far from the truth as plain torch on all classes in one dtype;
all processes have the same losses and gradients of the hidden states, to the bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import strategies as st
from support import drawn_losses
from support.drawn_losses import drawn
from support.numerics import assert_no_worse
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg

import fastft

EXAMPLES = 60


class Case(NamedTuple):
    of: str
    world: int
    dtype: str
    rows: int
    hidden: int
    classes: int  # of each process
    spread: float
    ignored: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    label_smoothing: float
    z_loss: float
    weight: bool
    bias: bool
    reduction: str
    num_items: float | None
    chunk_rows: int | None
    needs: tuple[bool, bool, bool]
    columns_first: bool
    seed: int


CASES = st.builds(
    Case,
    of=st.sampled_from(["logits", "head"]),
    world=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
    **(drawn_losses.SHAPES | {"classes": st.sampled_from([1, 2, 3, 15, 16, 17, 63])}),
    **drawn_losses.OPTIONS,
    bias=st.booleans(),
    chunk_rows=st.none() | st.sampled_from([1, 7, 64]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    columns_first=st.booleans(),
    seed=drawn_losses.SEED,
)


def check(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    classes = case.world * case.classes
    leaves = _leaves(case, classes, generator)
    needs = [need or case.of == "logits" for need in case.needs[: len(leaves)]]
    target = drawn_losses.targets(case.rows, classes, case.ignored, generator, case.ignore_index)
    weight = torch.rand(classes, generator=generator) + 0.1 if case.weight else None
    upstream = torch.randn(case.rows if case.reduction == "none" else (), generator=generator)

    def here() -> list[Tensor]:
        return _ours(case, leaves, needs, target, weight, upstream)

    found = in_threads(case.world, here)
    plain = drawn_losses.plain(case, target, weight)
    whole = [_plain(case, plain, leaves, upstream, dtype) for dtype in (None, torch.float64)]
    size = drawn_losses.size_of_loss(case, leaves, target)
    terms = case.rows + case.hidden + classes
    for rank, results in enumerate(found):
        parts = [[of[0], *_shards(case, of[1:], needs, rank)] for of in whole]
        for at, each in enumerate(zip(results, *parts, strict=True)):
            assert each[0].dtype == each[1].dtype
            what = f"result {at} of process {rank}"
            assert_no_worse(*each, what, terms=terms, size=size)
        alike = 1 + (case.of == "head" and needs[0])
        assert all(map(torch.equal, results[:alike], found[0][:alike])), "processes differ"


def _leaves(case: Case, classes: int, generator: torch.Generator) -> list[Tensor]:
    if case.of == "logits":
        shapes = [(case.rows, classes)]
    else:
        shapes = [(case.rows, case.hidden), (classes, case.hidden), (classes,)][: 2 + case.bias]
    leaves = [drawn(shape, generator, case.columns_first) for shape in shapes]
    leaves[case.of == "head"] *= case.spread
    return [leaf.to(getattr(torch, case.dtype)) for leaf in leaves]


def _shards(case: Case, whole: list[Tensor], needs: list[bool], rank: int) -> list[Tensor]:
    """Those of the leaves, or their gradients, that a process has and that are needed."""
    mine = slice(rank * case.classes, (rank + 1) * case.classes)
    parts = (
        [whole[0][:, mine]] if case.of == "logits" else [whole[0], *(t[mine] for t in whole[1:])]
    )
    return [part for part, need in zip(parts, needs, strict=True) if need]


def _ours(
    case: Case,
    leaves: list[Tensor],
    needs: list[bool],
    target: Tensor,
    weight: Tensor | None,
    upstream: Tensor,
) -> list[Tensor]:
    """Of this process: the loss, and the gradients that are needed."""
    parts = _shards(case, leaves, [True] * len(leaves), dist.get_rank())
    mine = [part.detach().requires_grad_(need) for part, need in zip(parts, needs, strict=True)]
    options: dict[str, Any] = drawn_losses.options_of(case) | drawn_losses.asked(case)
    options |= {"weight": weight, "group": dist.group.WORLD}
    if case.of == "logits":
        loss = fastft.cross_entropy(mine[0], target, **options)
    else:
        options |= {"linear_bias": mine[2] if case.bias else None, "chunk_rows": case.chunk_rows}
        loss = fastft.linear_cross_entropy(mine[0], mine[1], target, **options)
    wanted = [leaf for leaf in mine if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, upstream.to(loss.dtype)) if wanted else ()
    return [loss.detach(), *gradients]


def _plain(
    case: Case,
    plain: drawn_losses.Computed,
    leaves: list[Tensor],
    upstream: Tensor,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    (loss,) = plain(leaves[0] if case.of == "logits" else F.linear(*leaves))
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def in_threads(world: int, function: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What `function` returns in each of as many processes, which are threads."""
    found: list[Any] = [None] * world
    errors: list[BaseException] = []
    store = dist.HashStore()

    def process(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            found[rank] = function()
        except BaseException as error:
            errors.append(error)
            # the others wait for this one; they end behind it
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    with _processes_are_threads():
        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return found


@contextlib.contextmanager
def _processes_are_threads() -> Iterator[None]:
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    try:
        yield
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
