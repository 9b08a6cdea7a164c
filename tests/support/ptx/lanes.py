"""A launch, and the threads of it that run together: their registers, and which of them are
active."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from support.ptx.checks import WARP, Extent, Fault, GlobalMemory, SharedMemory, Threads
from support.ptx.parser import BITS, UINT, Kernel

_NUMPY = {"s": "i", "u": "u", "b": "u", "f": "f"}
_FULL_WARP = np.uint32(0xFFFFFFFF)


def dtype_of(kind: str) -> np.dtype:
    return np.dtype(bool) if kind == "pred" else np.dtype(f"{_NUMPY[kind[0]]}{BITS[kind] // 8}")


@dataclass
class Launch:
    """One launch of a kernel and what its threads did.

    `opcodes` counts instructions times the threads that came to them, those whose guard was false
    among these.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int  # threads
    shared: int  # bytes of a block, static and dynamic
    stream: int = 0
    device: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)

    @property
    def instructions(self) -> int:
        """Executed thread instructions, moves not counted."""
        return sum(count for opcode, count in self.opcodes.items() if not opcode.startswith("mov."))


class Constants:
    """What a launch only reads: its parameters, and the variables of the module; part of the memory
    of the launch."""

    def __init__(self, kernel: Kernel, parameters: bytes, memory: GlobalMemory) -> None:
        self.memory, self.parameters = memory, parameters
        self._kept = {
            name: _aligned(array.initial or b"") for name, array in kernel.variables.items()
        }
        self._kept[""] = _aligned(parameters)
        self.addresses = {name: array.ctypes.data for name, array in self._kept.items()}
        self.parameters_at = self.addresses[""]
        memory.add(
            Extent(
                self.addresses[name],
                self.addresses[name] + len(array),
                name or "the parameters",
                read_only=True,
            )
            for name, array in self._kept.items()
            if len(array)
        )


def _aligned(content: bytes) -> np.ndarray:
    """A copy on 16 bytes."""
    memory = np.zeros(len(content) + 16, np.uint8)
    copy = memory[-memory.ctypes.data % 16 :][: len(content)]
    copy[:] = np.frombuffer(content, np.uint8)
    return copy


class Lanes:
    """The threads of a batch of blocks: registers, shared memory and which of them are active."""

    def __init__(
        self, kernel: Kernel, launch: Launch, blocks: np.ndarray, constants: Constants, checks: bool
    ) -> None:
        self.constants, self.memory, self.threads_of_block = (
            constants,
            constants.memory,
            launch.block,
        )
        self.count = len(blocks) * launch.block
        self.all_slots = np.repeat(np.arange(len(blocks)), launch.block)
        self.all_blocks = blocks[self.all_slots].astype(np.int64)
        own = np.tile(np.arange(launch.block), len(blocks))
        self.all_threads = self.all_blocks * (-(-launch.block // WARP) * WARP) + own
        self.all_warps = self.all_slots * -(-launch.block // WARP) + own // WARP
        self.all_lanes = own % WARP
        self.shared = SharedMemory(launch.shared, len(blocks), checks)
        self.banks = self._registers(kernel)
        self._special = self._special_registers(launch, own)
        self.known = {name: np.zeros(self.count, bool) for name in kernel.watched}
        self.epochs = np.zeros(len(blocks), np.int64)
        self.warp_epochs = np.zeros(int(self.all_warps[-1]) + 1, np.int64)
        self._index: np.ndarray | None = None
        self._threads: Threads | None = None

    def _registers(self, kernel: Kernel) -> dict[str, np.ndarray]:
        widths = Counter(BITS[kind] for kind in kernel.registers.values())
        banks = {"pred": np.zeros((widths[1], self.count), bool)}
        for width, unsigned in UINT.items():
            bank = np.empty((widths[width], self.count), unsigned)
            for letter in "subf"[: 3 + (width >= 32)]:
                banks[f"{letter}{width}"] = bank.view(dtype_of(f"{letter}{width}"))
        return banks

    def _special_registers(self, launch: Launch, own: np.ndarray) -> dict[str, np.ndarray]:
        wide, high, _ = launch.grid
        of = {
            **{
                "tid.x": own,
                "ntid.x": launch.block,
                "laneid": self.all_lanes,
                "warpid": own // WARP,
            },
            **{"ctaid.x": self.all_blocks % wide, "ctaid.y": self.all_blocks // wide % high},
            "ctaid.z": self.all_blocks // (wide * high),
            **{f"nctaid.{axis}": size for axis, size in zip("xyz", launch.grid, strict=True)},
            **{"tid.y": 0, "tid.z": 0, "ntid.y": 1, "ntid.z": 1},
            **{"lanemask_lt": (1 << self.all_lanes) - 1, "lanemask_eq": 1 << self.all_lanes},
        }
        return {
            f"%{name}": np.broadcast_to(np.asarray(value, np.uint32), self.count)
            for name, value in of.items()
        }

    def special(self, name: str) -> np.ndarray:
        """What `%tid.x` and the like are for each active lane."""
        if name not in self._special:
            raise Fault("unknown opcode", f"special register {name}")
        return self.pick(self._special[name])

    # -- which lanes are active

    @property
    def index(self) -> np.ndarray | None:
        """The active lanes in ascending order; None for all."""
        return self._index

    def activate(self, index: np.ndarray | None) -> None:
        self._index, self._threads = index, None
        self.active = self.count if index is None else len(index)

    def pick(self, of_all: np.ndarray) -> np.ndarray:
        """The entries of the active lanes."""
        return of_all if self._index is None else of_all[self._index]

    @property
    def lane(self) -> np.ndarray:
        return self.pick(self.all_lanes)

    @property
    def warp(self) -> np.ndarray:
        return self.pick(self.all_warps)

    @property
    def slots(self) -> np.ndarray:
        return self.pick(self.all_slots)

    @property
    def threads(self) -> Threads:
        if self._threads is None:
            slots, warps = self.slots, self.warp
            epochs, warp_epochs = self.epochs[slots], self.warp_epochs[warps]
            self._threads = Threads(
                self.pick(self.all_threads), self.pick(self.all_blocks), epochs, warp_epochs
            )
        return self._threads

    # -- the warp

    def ballot(self, votes: np.ndarray) -> np.ndarray:
        """For each active lane the mask of its warp's active lanes with a vote."""
        masks = np.zeros(len(self.warp_epochs), np.uint32)
        np.bitwise_or.at(
            masks, self.warp[votes], np.uint32(1) << self.lane[votes].astype(np.uint32)
        )
        return masks[self.warp]

    def present_mask(self) -> np.ndarray:
        if self._index is None and self.threads_of_block % WARP == 0:
            return np.full(self.count, _FULL_WARP)
        return self.ballot(np.ones(self.active, bool))

    def from_lanes(self, values: np.ndarray, source: np.ndarray) -> np.ndarray:
        """For each active lane the value of lane `source` of its warp, which is active too."""
        of_all = np.zeros(self.count, values.dtype)
        of_all[slice(None) if self._index is None else self._index] = values
        here = np.arange(self.count) if self._index is None else self._index
        return of_all[here - self.lane + source]

    def sync_warps(self) -> None:
        self.warp_epochs[np.unique(self.warp)] += 1
        self._threads = None
