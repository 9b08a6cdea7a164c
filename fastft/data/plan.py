"""The plan, which examples share a pack: best-fit decreasing over the data set or windows of it.

The lengths are taken from the longest to the shortest (ties in the order they came). Each goes into
the open pack whose remaining capacity is the smallest that takes it, among equal ones into the pack
that has had this capacity longest, and into a new pack where none takes it. Only lengths and
indices move: 4 or 8 bytes are read and 16 written per example.

An epoch changes the order of the packs, and which of equally long examples is in which.
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft import ops
from fastft.checks import integer, optional_integer

OVERLONG = ("error", "truncate", "split", "drop")
# the kernel keeps 20 bytes per token of capacity: beyond, sorted lists are better
LARGEST_TABLES = 2**26


def plan_reference(
    lengths: Tensor,
    windows: Tensor,
    max_tokens: int,
    max_sequences: int,
    indices: Tensor,
    entry_lengths: Tensor,
    offsets: Tensor,
    counts: Tensor,
) -> None:
    """Plans in plain Python, into the kernel's outputs; `max_sequences=0` means no limit."""
    packs: list[list[int]] = []
    for window, (begin, end) in enumerate(itertools.pairwise(windows.tolist())):
        made = _best_fit(lengths[begin:end], max_tokens, max_sequences)
        packs += [[begin + i for i in pack] for pack in made]
        counts[window] = len(made)
    indices.copy_(torch.tensor([i for pack in packs for i in pack], dtype=torch.int64))
    entry_lengths.copy_(lengths[indices])
    offsets[0] = 0
    offsets[1 : len(packs) + 1] = torch.tensor(
        [len(pack) for pack in packs], dtype=torch.int64
    ).cumsum(0)


def _best_fit(lengths: Tensor, max_tokens: int, max_sequences: int) -> list[list[int]]:
    sizes = lengths.tolist()
    packs: list[list[int]] = []
    capacities: list[int] = []  # those in use, sorted
    waiting: dict[int, deque[int]] = defaultdict(deque)
    for i in torch.sort(lengths, descending=True, stable=True).indices.tolist():
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
    return packs


def _tables_fit(device: torch.device, lengths: Tensor, max_tokens: int) -> str | None:
    tokens = min(max_tokens, int(lengths.sum())) if max_tokens > LARGEST_TABLES else 0
    if tokens <= LARGEST_TABLES:
        return None
    return f"its tables hold packs of up to {LARGEST_TABLES} tokens, one could have {tokens}"


PLAN = ops.Operator(
    "plan_packs(Tensor lengths, Tensor windows, int max_tokens, int max_sequences, "
    "Tensor(a!) indices, Tensor(b!) entry_lengths, Tensor(c!) offsets, Tensor(d!) counts) -> ()",
    plan_reference,
    engines={"cpp": _tables_fit},
    samples={"packs beyond 2^26 tokens": (torch.tensor([2**26, 1]), 2**26 + 1)},
)


def _bounds(offsets: memoryview, packs: Sequence[int]) -> list[tuple[int, int]]:
    """Finds the bounds of packs; see `PackPlan.bounds`."""
    count = len(offsets) - 1
    found: list[tuple[int, int]] = []
    for pack in packs:
        position = pack + count if pack < 0 else pack
        if not 0 <= position < count:
            raise IndexError(f"pack {pack} of a plan with {count} packs")
        found.append((offsets[position], offsets[position + 1]))
    return found


class PlanNumbers(NamedTuple):
    """The numbers of a `PackPlan`, int64 each; no `starts` where all are 0."""

    offsets: memoryview
    indices: memoryview
    lengths: memoryview
    starts: memoryview | None

    def packs(self, packs: Sequence[int]) -> tuple[list[tuple[int, int]], list[list[int]]]:
        """Reads the bounds of packs, and all their entries' `indices`, `lengths` and `starts`."""
        bounds = _bounds(self.offsets, packs)
        read = [
            [*itertools.chain(*[numbers[begin:end].tolist() for begin, end in bounds])]
            for numbers in self[1:]
            if numbers is not None
        ]
        return bounds, read if len(read) == 3 else [*read, [0] * len(read[0])]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Packs of example indices: `plan[p]` are those of pack p, an int64 tensor.

    Attributes:
        indices: int64 (entries,), the example of each entry, all packs one after another. A split
            example has several.
        offsets: int64 (packs + 1,), pack p holds the entries from `offsets[p]` up to `offsets[p +
            1]`.
        starts: int64 (entries,), the entry's first token within its example; not zero only after
            `overlong="split"`.
        lengths: int64 (entries,), the entry's number of tokens.
        windows: int64 (packs,), the window whose examples the pack holds; all zero where there is
            only one.
        max_tokens: the capacity that the packs were made for.
    """

    indices: Tensor
    offsets: Tensor
    starts: Tensor
    lengths: Tensor
    windows: Tensor
    max_tokens: int

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __getitem__(self, pack: int) -> Tensor:
        begin, end = self.bounds(pack)
        return self.indices[begin:end]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.indices.split(self.offsets.diff().tolist()))

    def bounds(self, pack: int) -> tuple[int, int]:
        """Finds the first entry of a pack and the one after its last.

        Args:
            pack: its number; a negative one counts from the end.

        Raises:
            IndexError: there is no such pack.
        """
        return _bounds(self.offsets.numpy().data, [pack])[0]

    def numbers(self) -> PlanNumbers:
        """Its numbers as Python reads them: a few of torch's, or numpy's, cost several times more.

        They share the plan's memory.
        """
        offsets, indices, lengths, starts = (
            tensor.numpy().data
            for tensor in (self.offsets, self.indices, self.lengths, self.starts)
        )
        return PlanNumbers(offsets, indices, lengths, starts if self.starts.any() else None)

    def reordered(self, order: Tensor) -> PackPlan:
        """Puts the packs in another order: pack p of the result is pack `order[p]` of this plan."""
        sizes = self.offsets.diff()[order]
        offsets = torch.zeros_like(self.offsets)
        torch.cumsum(sizes, 0, out=offsets[1:])
        # entry e of the new pack p was entry e - offsets[p] + self.offsets[order[p]]
        moved = torch.repeat_interleave(self.offsets[:-1][order] - offsets[:-1], sizes)
        entries = moved + torch.arange(moved.numel())
        return replace(self.entries(entries), offsets=offsets, windows=self.windows[order])

    def entries(self, order: Tensor) -> PackPlan:
        """Puts other entries in the packs: entry e of the result is this plan's `order[e]`."""
        return replace(
            self,
            indices=self.indices[order],
            starts=self.starts[order],
            lengths=self.lengths[order],
        )

    @property
    def efficiency(self) -> float:
        """The share of the packs' capacity that tokens fill."""
        return self.lengths.sum().item() / (len(self) * self.max_tokens)


def _as_tensor(lengths: Any) -> Tensor:
    if hasattr(lengths, "to_numpy"):  # Arrow, pandas
        lengths = lengths.to_numpy()
    if isinstance(lengths, list) and lengths and type(lengths[0]) is int:
        with contextlib.suppress(TypeError):  # not all are integers: torch will say what they are
            # many times faster than torch.tensor
            return torch.frombuffer(array("q", lengths), dtype=torch.int64)
    flags = getattr(lengths, "flags", None)
    if flags is not None and not flags.writeable:
        return torch.tensor(lengths)  # torch does not like to share memory that is read-only
    return torch.as_tensor(lengths)


def _dense(lengths: Any) -> Tensor:
    """Turns lengths into a tensor on the CPU; raises where they are no numbers, or too large."""
    try:
        tensor = _as_tensor(lengths)
        if tensor.is_meta or tensor.layout != torch.strided:
            raise TypeError(f"a tensor with the layout {tensor.layout} on {tensor.device}")
        tensor = tensor.cpu()
    except OverflowError:
        raise ValueError("lengths must fit into int64, got one that is larger") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"lengths must be a list, array or dense tensor of integers, got {error}"
        ) from None
    if tensor.dtype == torch.uint64 and bool((tensor.long() < 0).any()):
        raise ValueError("lengths must fit into int64, got one that is larger")
    return tensor


def _checked_lengths(lengths: Any) -> Tensor:
    tensor = _dense(lengths)
    if tensor.numel() == 0:
        raise ValueError("lengths is empty: there is nothing to pack")
    if (
        tensor.dim() != 1
        or tensor.is_floating_point()
        or tensor.is_complex()
        or tensor.dtype == torch.bool
    ):
        raise ValueError(
            f"lengths must be one-dimensional integers, got shape {tuple(tensor.shape)} of "
            f"{tensor.dtype}"
        )
    if tensor.dtype != torch.int32:
        tensor = tensor.to(torch.int64)
    tensor = tensor.contiguous()
    if tensor.aminmax().min <= 0:  # a third of the time of amin
        smallest, index = tensor.min(0)
        what = "has no tokens" if smallest == 0 else f"has the negative length {smallest}"
        raise ValueError(f"lengths: example {index} {what}; take it out of the dataset")
    return tensor


def _entries(
    lengths: Tensor, max_tokens: int, overlong: str
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Makes entries of the examples, none of which exceeds max_tokens.

    Returns:
        The example of each entry, its start and its length; None for what is trivial.
    """
    if lengths.aminmax().max <= max_tokens:
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
            raise ValueError(
                f"overlong='drop' leaves nothing: every example has more than "
                f"max_tokens={max_tokens}"
            )
        return kept, None, lengths[kept]
    pieces = (lengths - 1) // max_tokens + 1
    if (many := float(pieces.sum(dtype=torch.float64))) >= 2**31:
        longest, index = lengths.max(0)
        raise ValueError(
            f"overlong='split' would make {many:.0f} pieces of at most {max_tokens} tokens, fewer "
            f"than 2^31 can be planned; example {index} has {longest} tokens"
        )
    examples = torch.repeat_interleave(pieces)
    starts = (torch.arange(examples.numel()) - (pieces.cumsum(0) - pieces)[examples]) * max_tokens
    return examples, starts, (lengths[examples] - starts).clamp(max=max_tokens)


def generator_for(seed: int, epoch: int = 0) -> torch.Generator:
    """Seeds the random numbers of an epoch; no epoch of another seed has the same."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)


def shuffled_order(windows: Tensor, generator: torch.Generator, group: int = 1) -> Tensor:
    """Draws an order of packs, int64 (packs,): groups of neighbours, shuffled within their window.

    Args:
        windows: int64 (packs,), not decreasing, the window of each pack; that of a group is its
            first pack's.
        generator: where the random numbers come from.
        group: packs in a group; divides the number of packs.
    """
    lots = torch.randperm(windows.numel() // group, generator=generator)
    groups = lots[windows[::group][lots].argsort(stable=True)]
    return (groups[:, None] * group + torch.arange(group)).flatten()


def checked_limits(max_tokens: Any, max_sequences: Any, overlong: Any) -> tuple[int, int | None]:
    """Checks the limits of a pack, and returns those in tokens and in sequences.

    Raises:
        ValueError: there is no such capacity, number of sequences or policy.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
    return (
        integer("max_tokens", max_tokens, bits=31),
        optional_integer("max_sequences", max_sequences),
    )


def plan_packs(
    lengths: Any,
    max_tokens: int,
    *,
    overlong: str = "error",
    max_sequences: int | None = None,
    window: int | None = None,
    seed: int | None = None,
    impl: str = "auto",
) -> PackPlan:
    """Shares examples out over packs of at most `max_tokens` tokens, by best fit decreasing.

    Args:
        lengths: tokens of each example: a list, a NumPy or Arrow array or a tensor of N positive
            integers.
        max_tokens: capacity of a pack in tokens, below 2^31.
        overlong: what becomes of an example with more than `max_tokens`: `"error"`; `"truncate"`
            keeps its first `max_tokens`; `"split"` makes pieces of it, each a sequence of its own;
            `"drop"`.
        max_sequences: at most so many entries in a pack; None for no limit.
        window: only examples of the same `window` consecutive ones share a pack, and the packs come
            window by window: the order of the dataset (a curriculum) is kept but for that much.
            None for one window of all examples.
        seed: in [0, 2^63), shuffles the order of a window's packs, the same way for the same seed;
            None begins with the longest.
        impl: `"auto"`, `"cpp"` or `"eager"`; all give the same plan.

    Raises:
        ValueError: no lengths, a length that is not positive, one above `max_tokens` (with
            `overlong="error"`), or an argument out of its range.
        TypeError: `lengths` are no numbers.
        RuntimeError: the engine asked for is not available, or is `"cpp"` and a pack could have
            more than 2^26 tokens.
    """
    max_tokens, max_sequences = checked_limits(max_tokens, max_sequences, overlong)
    window, seed = optional_integer("window", window), optional_integer("seed", seed, least=0)
    PLAN.resolve(impl, torch.device("cpu"))
    checked = _checked_lengths(lengths)
    examples, starts, sizes = _entries(checked, max_tokens, overlong)
    plan = PLAN.implementation(impl, torch.device("cpu"), sizes, max_tokens)
    # the first entry of each window; the number of entries is last
    edges = torch.tensor([*range(0, checked.numel(), window or checked.numel()), checked.numel()])
    windows = edges if examples is None else torch.searchsorted(examples, edges)
    indices, entry_lengths, offsets = (
        torch.empty(sizes.numel() + extra, dtype=torch.int64) for extra in (0, 0, 1)
    )
    counts = torch.empty(windows.numel() - 1, dtype=torch.int64)
    plan(sizes, windows, max_tokens, max_sequences or 0, indices, entry_lengths, offsets, counts)
    # a view of one zero costs no memory
    zeros = torch.zeros(1, dtype=torch.int64).expand(indices.numel())
    made = PackPlan(
        indices=indices if examples is None else examples[indices],
        offsets=offsets[: int(counts.sum()) + 1].clone(),
        starts=zeros if starts is None else starts[indices],
        lengths=entry_lengths,
        windows=torch.repeat_interleave(counts),
        max_tokens=max_tokens,
    )
    if seed is None:
        return made
    return made.reordered(shuffled_order(made.windows, generator_for(seed)))


def epoch_plan(plan: PackPlan, seed: int, epoch: int, group: int = 1) -> PackPlan:
    """Draws the plan of an epoch: other mates, and groups of `group` packs in a random order.

    Each group stays within its window. All follows from the plan, the seed and the number of the
    epoch: every rank draws the same without asking the others, a run that resumes draws what it
    drew before, and number, lengths and costs of the packs never change.
    """
    generator = generator_for(seed, epoch)
    exchanged = plan.entries(_exchanged(plan, generator))
    return exchanged.reordered(shuffled_order(plan.windows, generator, group))


def _exchanged(plan: PackPlan, generator: torch.Generator) -> Tensor:
    """Draws the entry that takes each one's place, of the same window and length."""
    kinds = plan.lengths + (plan.max_tokens + 1) * torch.repeat_interleave(
        plan.windows, plan.offsets.diff()
    )
    lots = torch.randperm(kinds.numel(), generator=generator)
    exchanged = torch.empty_like(lots)
    exchanged[kinds.argsort(stable=True)] = lots[kinds[lots].argsort(stable=True)]
    return exchanged
