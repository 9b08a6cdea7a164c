"""What a launch may not do: memory that is not its own, unwritten bytes, races, threads that miss
one another.

Memory is this process's own: a global address is that of a CPU tensor, and must lie in an extent
that was given to the launch. Races are found in the log of all accesses, whatever order the threads
happened to run in: two threads touch one place, one of them writes, and no barrier (of the block,
or of the warp for threads of one warp) lies between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from support.ptx.parser import UINT, Instruction

WARP = 32
SHARED_WINDOW = 1 << 60  # where generic addresses of shared memory begin
_FIRST = 4096  # no address of this process lies below
_SPAN = (1 << 47) - _FIRST
_BYTES = np.frombuffer((ctypes.c_uint8 * _SPAN).from_address(_FIRST), dtype=np.uint8)
_MEMORY = {size: _BYTES[: _SPAN // size * size].view(UINT[8 * size]) for size in (1, 2, 4, 8)}


class Fault(Exception):
    """Something that a GPU would do wrong, or not do; `kind` names it, `kernel` and `instruction`
    say where."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail
        self.kernel, self.instruction = "", None

    def at(self, kernel: str, instruction: Instruction) -> Fault:
        """The same with its place, unless it has one."""
        self.kernel = self.kernel or kernel
        self.instruction = self.instruction or instruction
        return self

    def __str__(self) -> str:
        place = (
            f"\n  in {self.kernel}, {self.instruction or 'at its launch'}" if self.kernel else ""
        )
        return f"{self.kind}: {self.detail}{place}"


@dataclass
class Extent:
    """Bytes that a launch may touch: `width` of every `pitch` from `begin` to `end`.

    `written` has a flag for each byte, or is None for memory that counts as written.
    """

    begin: int
    end: int
    name: str
    pitch: int = 0
    width: int = 0
    written: np.ndarray | None = None
    read_only: bool = False


@dataclass
class Threads:
    """Who accesses: for each lane its thread (numbered over the grid), block and the barriers that
    it has passed."""

    thread: np.ndarray
    block: np.ndarray
    epoch: np.ndarray  # barriers of the block
    warp_epoch: np.ndarray  # barriers and shuffles of the warp


@dataclass
class Access:
    """What one instruction did for some threads: `size` bytes at each of `addresses`."""

    instruction: Instruction
    addresses: np.ndarray
    size: int
    writes: bool
    threads: Threads


@dataclass
class Log:
    """Accesses to one memory, and the search for races among them."""

    kind: str
    accesses: list[Access] = field(default_factory=list)

    def check(self) -> None:
        """Raises a Fault if two of the threads race; forgets the accesses."""
        accesses, self.accesses = self.accesses, []
        if not any(access.writes for access in accesses):
            return
        unit = min(access.size for access in accesses)
        places, numbers = _in_units(accesses, unit)
        is_write = np.array([access.writes for access in accesses])[numbers]
        thread = _spread(accesses, unit, "thread")
        kept = _touched_by_several(places, is_write, thread)
        if kept.size:
            self._judge(
                accesses, unit, places[kept], numbers[kept], is_write[kept], thread[kept], kept
            )

    def _judge(
        self,
        accesses: list[Access],
        unit: int,
        places: np.ndarray,
        numbers: np.ndarray,
        is_write: np.ndarray,
        thread: np.ndarray,
        kept: np.ndarray,
    ) -> None:
        block, epoch, warp_epoch = (
            _spread(accesses, unit, what)[kept] for what in ("block", "epoch", "warp_epoch")
        )
        warp = thread // WARP
        suspects = (
            (f"{self.kind} race between blocks", [places], block),
            (f"{self.kind} race", [places, block, epoch], warp),
            (f"{self.kind} race", [places, block, epoch, warp, warp_epoch], thread),
        )
        for kind, keys, party in suspects:
            pair = _first_conflict(keys, party, is_write)
            if pair is None:
                continue
            first, second = sorted(pair, key=lambda i: numbers[i])
            one, other = accesses[numbers[first]], accesses[numbers[second]]
            verbs = ["writes" if access.writes else "reads" for access in (one, other)]
            detail = (
                f"thread {thread[first]} {verbs[0]} and thread {thread[second]} {verbs[1]} the "
                f"same place"
            )
            fault = Fault(kind, f"{detail} with no barrier between; the first by {one.instruction}")
            fault.instruction = other.instruction
            raise fault


def _in_units(accesses: list[Access], unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Each access as the places of `unit` bytes that it touches, and the number of the access of
    each."""
    places = [
        ((access.addresses // unit)[:, None] + np.arange(access.size // unit)).ravel()
        for access in accesses
    ]
    return np.concatenate(places), np.repeat(
        np.arange(len(accesses)), [len(each) for each in places]
    )


def _spread(accesses: list[Access], unit: int, what: str) -> np.ndarray:
    return np.concatenate(
        [np.repeat(getattr(access.threads, what), access.size // unit) for access in accesses]
    )


def _touched_by_several(places: np.ndarray, is_write: np.ndarray, thread: np.ndarray) -> np.ndarray:
    """Indices of all accesses to places which one thread writes and another one touches."""
    low = int(places.min())
    if int(places.max()) - low < 4 * len(places) + (1 << 16):
        numbers, count = places - low, int(places.max()) - low + 1
    else:
        values, numbers = np.unique(places, return_inverse=True)
        count = len(values)
    owner = np.full(count, -1, np.int64)
    owner[numbers[is_write]] = thread[is_write]
    owners = owner[numbers]
    contested = np.zeros(count, bool)
    contested[numbers[(owners != -1) & (owners != thread)]] = True
    return np.flatnonzero(contested[numbers])


def _first_conflict(
    keys: list[np.ndarray], party: np.ndarray, is_write: np.ndarray
) -> tuple[int, int] | None:
    """Two accesses with equal keys, one of them a write, by different parties; None if there are
    none."""
    order = np.lexsort(keys[::-1])
    changes = np.zeros(len(order), bool)
    changes[0] = True
    for key in keys:
        changes[1:] |= np.diff(key[order]) != 0
    begins = np.flatnonzero(changes)
    parties, writes = party[order], is_write[order]
    mixed = np.minimum.reduceat(parties, begins) != np.maximum.reduceat(parties, begins)
    guilty = np.flatnonzero(mixed & np.logical_or.reduceat(writes, begins))
    if not guilty.size:
        return None
    begin, end = begins[guilty[0]], [*begins, len(order)][guilty[0] + 1]
    group = order[begin:end]
    writer = group[is_write[group]][0]
    other = group[party[group] != party[writer]][0]
    return int(writer), int(other)


class GlobalMemory:
    """The extents of a launch, their contents, and the accesses to them."""

    def __init__(
        self, extents: Iterable[Extent], elsewhere: Iterable[Extent] = (), checks: bool = True
    ) -> None:
        self.elsewhere = list(elsewhere)  # the host's, and of other devices
        self.checks = checks
        self.extents: list[Extent] = []
        self.add(extents)
        self.log = Log("global")
        self.bytes_read = self.bytes_written = 0
        self._last: Extent | None = None

    def add(self, extents: Iterable[Extent]) -> None:
        self.extents = _disjoint([*self.extents, *extents])
        self.begins = np.array([extent.begin for extent in self.extents], np.int64)

    def read(self, access: Access, size: int) -> list[np.ndarray]:
        """The values of each element of `size` bytes, one array for each element of a vector."""
        self._admit(access, size)
        first = (access.addresses - _FIRST) // size
        return [_MEMORY[size][first + j] for j in range(access.size // size)]

    def write(self, access: Access, size: int, values: list[np.ndarray]) -> None:
        self._admit(access, size)
        first = (access.addresses - _FIRST) // size
        for j, value in enumerate(values):
            _MEMORY[size][first + j] = value
            if np.any(_MEMORY[size][first + j] != value):
                raise Fault(
                    "global race", "two threads write different values to one place at once"
                )

    def _admit(self, access: Access, size: int) -> None:
        _check_alignment(access)
        low, high = int(access.addresses.min()), int(access.addresses.max()) + access.size
        extent = self._last
        if extent is None or low < extent.begin or high > extent.end:
            extent = self._extent_of(low)
        if extent is not None and high <= extent.end:
            self._last = extent
            self._admit_to(extent, access, access.addresses)
        else:
            self._admit_each(access)
        if self.checks:
            self.log.accesses.append(access)

    def _extent_of(self, address: int) -> Extent | None:
        i = int(np.searchsorted(self.begins, address, "right")) - 1
        return self.extents[i] if i >= 0 and address < self.extents[i].end else None

    def _admit_each(self, access: Access) -> None:
        numbers = np.searchsorted(self.begins, access.addresses, "right") - 1
        for number in np.unique(numbers):
            addresses = access.addresses[numbers == number]
            extent = self._extent_of(int(addresses[0]))
            if extent is None or int(addresses.max()) + access.size > extent.end:
                raise self._outside(access, addresses, extent)
            self._admit_to(extent, access, addresses)

    def _admit_to(self, extent: Extent, access: Access, addresses: np.ndarray) -> None:
        if extent.pitch and np.any(
            (addresses - extent.begin) % extent.pitch + access.size > extent.width
        ):
            raise Fault("out of bounds", f"{access.size} bytes between the rows of {extent.name}")
        if extent.read_only and access.writes:
            raise Fault("out of bounds", f"writes {extent.name}, which no kernel may write")
        moved = len(addresses) * access.size
        self.bytes_written += moved * access.writes
        # parameters lie in no memory
        self.bytes_read += moved * (not access.writes and not extent.read_only)
        if extent.written is None:
            return
        at = (addresses - extent.begin)[:, None] + np.arange(access.size)
        if access.writes:
            extent.written[at] = True
        elif not extent.written[at].all():
            missing = int(at[~extent.written[at]].min())
            raise Fault("unwritten", f"reads byte {missing} of {extent.name}, which nobody wrote")

    def _outside(self, access: Access, addresses: np.ndarray, extent: Extent | None) -> Fault:
        ends = addresses + access.size
        address = int(addresses[0] if extent is None else addresses[ends > extent.end][0])
        for other in self.elsewhere:
            if other.begin <= address < other.end:
                return Fault("another device", f"the kernel touches {other.name}")
        before = [other for other in self.extents if other.begin <= address]
        near = (
            f"; {address - before[-1].begin} bytes after the begin of {before[-1].name}"
            if before
            else ""
        )
        verb = "writes" if access.writes else "reads"
        return Fault(
            "out of bounds",
            f"{verb} {access.size} bytes at {address:#x}, in no tensor of the launch{near}",
        )


def _check_alignment(access: Access) -> None:
    if np.any(access.addresses % access.size):
        worst = int(access.addresses[access.addresses % access.size != 0][0])
        raise Fault("misaligned", f"{access.size} bytes at {worst:#x}")


def _disjoint(extents: Iterable[Extent]) -> list[Extent]:
    """Sorted, none twice; those that overlap become one without gaps."""
    result: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.begin, -extent.end)):
        if not result or extent.begin >= result[-1].end:
            result.append(extent)
        elif (extent.begin, extent.end, extent.pitch) != (
            result[-1].begin,
            result[-1].end,
            result[-1].pitch,
        ):
            last = result[-1]
            end = max(last.end, extent.end)
            result[-1] = Extent(
                last.begin, end, last.name, read_only=last.read_only and extent.read_only
            )
    return result


class SharedMemory:
    """The shared memory of blocks that run together: each has `size` bytes, which nobody has
    written yet."""

    def __init__(self, size: int, blocks: int, checks: bool = True) -> None:
        self.pitch, self.size, self.checks = -(-max(size, 16) // 16) * 16, size, checks
        memory = np.full(self.pitch * blocks // 8, 0xFFFFFFFFFFFFFFFF, np.uint64)  # NaN
        self.memory = {bytes_: memory.view(UINT[8 * bytes_]) for bytes_ in (1, 2, 4, 8)}
        self.written = np.zeros(self.pitch * blocks, bool)
        self.log = Log("shared")

    def read(self, access: Access, slots: np.ndarray, size: int) -> list[np.ndarray]:
        """As GlobalMemory.read; `slots`: which of the blocks each thread is of."""
        at = self._admit(access, slots)
        if not self.written[at[:, None] + np.arange(access.size)].all():
            raise Fault("unwritten", "reads shared memory that no thread of its block wrote")
        self._note(access, at)
        return [self.memory[size][at // size + j] for j in range(access.size // size)]

    def write(self, access: Access, slots: np.ndarray, size: int, values: list[np.ndarray]) -> None:
        at = self._admit(access, slots)
        first = at // size
        known = self.written[at]
        changes = ~known | np.any(
            [self.memory[size][first + j] != value for j, value in enumerate(values)], 0
        )
        for j, value in enumerate(values):
            self.memory[size][first + j] = value
            if np.any(self.memory[size][first + j] != value):
                raise Fault(
                    "shared race", "two threads write different values to one place at once"
                )
        self.written[at[:, None] + np.arange(access.size)] = True
        _, firsts = np.unique(at, return_index=True)
        if len(firsts) < len(at):  # one value, stored by several at once
            of_first = np.zeros(len(at), bool)
            of_first[firsts] = True
            changes &= of_first
        self._note(access, at, changes)

    def _admit(self, access: Access, slots: np.ndarray) -> np.ndarray:
        _check_alignment(access)
        addresses = access.addresses
        if int(addresses.min()) < 0 or int(addresses.max()) + access.size > self.size:
            worst = max(int(addresses.max()), -int(addresses.min()))
            raise Fault(
                "out of bounds",
                f"{access.size} bytes at {worst} of {self.size} bytes of shared memory",
            )
        return addresses + slots * self.pitch

    def _note(self, access: Access, at: np.ndarray, changes: np.ndarray | None = None) -> None:
        """Writes that change nothing are no race: Triton lets threads with one value all store
        it."""
        if not self.checks:
            return
        threads = access.threads
        if changes is not None and not changes.all():
            at = at[changes]
            fields = (threads.thread, threads.block, threads.epoch, threads.warp_epoch)
            threads = Threads(*(each[changes] for each in fields))
        if len(at):
            self.log.accesses.append(
                Access(access.instruction, at, access.size, access.writes, threads)
            )


def noise(bits: np.ndarray, ulp: int) -> np.ndarray:
    """An error of -ulp to ulp last places: a function of the input's bits, as that of a real
    approximation."""
    hashed = bits.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((hashed >> np.uint64(40)) % np.uint64(2 * ulp + 1)).astype(np.int32) - np.int32(ulp)
