"""Which examples share a pack: best-fit decreasing bin packing over the whole data set.

The lengths are taken from the longest to the shortest (ties in the order they came). Each goes into the open pack whose
remaining capacity is the smallest that takes it, among equal ones into the pack that has had this capacity longest, and
into a new pack where none takes it. Only lengths and indices move: 8 bytes are read and 24 written per example.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft import ops

OVERLONG = ("error", "truncate", "split", "drop")


def plan_reference(
    lengths: Tensor,
    max_tokens: int,
    max_sequences: int,
    indices: Tensor,
    entry_lengths: Tensor,
    offsets: Tensor,
    count: Tensor,
) -> None:
    """The plan in plain Python, into the same outputs as the kernel; `max_sequences=0` means no limit."""
    order = torch.sort(lengths, descending=True, stable=True).indices.tolist()
    sizes = lengths.tolist()
    packs: list[list[int]] = []
    capacities: list[int] = []  # those in use, sorted
    waiting: dict[int, deque[int]] = defaultdict(deque)
    for i in order:
        place = bisect_left(capacities, sizes[i])
        if place == len(capacities):
            pack, capacity = len(packs), max_tokens
            packs.append([])
        else:
            capacity = capacities[place]
            pack = waiting[capacity].popleft()
            if not waiting[capacity]:
                del capacities[place]
        packs[pack].append(i)
        left = capacity - sizes[i]
        if left > 0 and len(packs[pack]) != max_sequences:
            if not waiting[left]:
                insort(capacities, left)
            waiting[left].append(pack)
    indices.copy_(torch.tensor([i for pack in packs for i in pack], dtype=torch.int64))
    entry_lengths.copy_(lengths[indices])
    offsets[0] = 0
    offsets[1 : len(packs) + 1] = torch.tensor([len(pack) for pack in packs], dtype=torch.int64).cumsum(0)
    count.fill_(len(packs))


PLAN = ops.Operator(
    "plan_packs(Tensor lengths, int max_tokens, int max_sequences, Tensor(a!) indices, Tensor(b!) entry_lengths, "
    "Tensor(c!) offsets, Tensor(d!) count) -> ()",
    plan_reference,
    engines=("cpp",),
)


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Packs of example indices; `plan[p]` is the int64 tensor of pack p's, iteration goes over all packs.

    Attributes:
        indices: int64 (entries,), the example of each entry, all packs one after another. A split example has several.
        offsets: int64 (packs + 1,), pack p holds the entries from `offsets[p]` up to `offsets[p + 1]`.
        starts: int64 (entries,), the entry's first token within its example; not zero only after `overlong="split"`.
        lengths: int64 (entries,), the entry's number of tokens.
        max_tokens: the capacity that the packs were made for.
    """

    indices: Tensor
    offsets: Tensor
    starts: Tensor
    lengths: Tensor
    max_tokens: int

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __getitem__(self, pack: int) -> Tensor:
        begin, end = self.bounds(pack)
        return self.indices[begin:end]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.indices.split(self.offsets.diff().tolist()))

    def bounds(self, pack: int) -> tuple[int, int]:
        """The first entry of a pack and the one after its last; a negative `pack` counts from the end.

        Raises:
            IndexError: there is no such pack.
        """
        position = pack + len(self) if pack < 0 else pack
        if not 0 <= position < len(self):
            raise IndexError(f"pack {pack} of a plan with {len(self)} packs")
        begin, end = self.offsets[position : position + 2].tolist()
        return begin, end

    @property
    def efficiency(self) -> float:
        """The share of the packs' capacity that tokens fill."""
        return self.lengths.sum().item() / (len(self) * self.max_tokens)


def _checked_lengths(lengths: Any) -> Tensor:
    tensor = torch.as_tensor(lengths)
    if tensor.numel() == 0:
        raise ValueError("lengths is empty: there is nothing to pack")
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"lengths must be one-dimensional integers, got shape {tuple(tensor.shape)} of {tensor.dtype}")
    tensor = tensor.to("cpu", torch.int64).contiguous()
    if tensor.amin() <= 0:
        smallest, index = tensor.min(0)
        what = "has no tokens" if smallest == 0 else f"has the negative length {smallest}"
        raise ValueError(f"lengths: example {index} {what}; take it out of the dataset")
    return tensor


def _entries(lengths: Tensor, max_tokens: int, overlong: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(example of each entry, its start, its length) once no entry exceeds max_tokens; None where it is trivial."""
    if lengths.amax() <= max_tokens:
        return None, None, lengths
    if overlong == "error":
        longest, index = lengths.max(0)
        raise ValueError(
            f"example {index} has {longest} tokens, more than max_tokens={max_tokens}; "
            "overlong='truncate', 'split' or 'drop' says what to do with it"
        )
    if overlong == "truncate":
        return None, None, lengths.clamp(max=max_tokens)
    if overlong == "drop":
        kept = (lengths <= max_tokens).nonzero().squeeze(1)
        if kept.numel() == 0:
            raise ValueError(f"overlong='drop' leaves nothing: every example has more than max_tokens={max_tokens}")
        return kept, None, lengths[kept]
    pieces = (lengths + max_tokens - 1) // max_tokens
    examples = torch.repeat_interleave(pieces)
    starts = (torch.arange(examples.numel()) - (pieces.cumsum(0) - pieces)[examples]) * max_tokens
    return examples, starts, (lengths[examples] - starts).clamp(max=max_tokens)


def _shuffled(plan: PackPlan, seed: int) -> PackPlan:
    sizes = plan.offsets.diff()
    order = torch.randperm(len(plan), generator=torch.Generator().manual_seed(seed))
    offsets = torch.zeros_like(plan.offsets)
    torch.cumsum(sizes[order], 0, out=offsets[1:])
    # entry e of the new pack p was entry e - offsets[p] + plan.offsets[order[p]]
    moved = torch.repeat_interleave(plan.offsets[:-1][order] - offsets[:-1], sizes[order])
    entries = moved + torch.arange(moved.numel())
    return PackPlan(plan.indices[entries], offsets, plan.starts[entries], plan.lengths[entries], plan.max_tokens)


def plan_packs(
    lengths: Any,
    max_tokens: int,
    *,
    overlong: str = "error",
    max_sequences: int | None = None,
    seed: int | None = None,
    impl: str = "auto",
) -> PackPlan:
    """Distributes examples over packs of at most `max_tokens` tokens: best-fit decreasing, over all of them at once.

    Args:
        lengths: tokens of each example: a list, array or tensor of N positive integers.
        max_tokens: capacity of a pack in tokens, below 2^31.
        overlong: what becomes of an example with more than `max_tokens`: `"error"`; `"truncate"` keeps its first
            `max_tokens`; `"split"` makes pieces of it, each a sequence of its own; `"drop"`.
        max_sequences: at most so many entries in a pack; None for no limit.
        seed: shuffles the order of the packs, the same way for the same seed; None begins with the longest.
        impl: `"auto"`, `"cpp"` or `"eager"`; all give the same plan.

    Raises:
        ValueError: no lengths, a length that is not positive, one above `max_tokens` (with `overlong="error"`), or an
            argument out of its range.
        RuntimeError: the engine asked for is not available.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or not 0 < max_tokens < 2**31:
        raise ValueError(f"max_tokens must be an integer in [1, 2^31), got {max_tokens!r}")
    if max_sequences is not None and (not isinstance(max_sequences, int) or max_sequences < 1):
        raise ValueError(f"max_sequences must be a positive integer or None, got {max_sequences!r}")
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
    plan = PLAN.implementation(impl, torch.device("cpu"))
    examples, starts, sizes = _entries(_checked_lengths(lengths), max_tokens, overlong)
    indices, entry_lengths = torch.empty_like(sizes), torch.empty_like(sizes)
    offsets, count = torch.empty(sizes.numel() + 1, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    plan(sizes, max_tokens, max_sequences or 0, indices, entry_lengths, offsets, count)
    first_tokens = torch.zeros_like(indices) if starts is None else starts[indices]
    members = indices if examples is None else examples[indices]
    made = PackPlan(members, offsets[: int(count) + 1].clone(), first_tokens, entry_lengths, max_tokens)
    return made if seed is None else _shuffled(made, seed)
