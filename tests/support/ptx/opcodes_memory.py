"""The opcodes that touch memory or look at other threads of the warp; see opcodes.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from support.ptx.checks import SHARED_WINDOW, WARP, Access, Fault
from support.ptx.opcodes import Run, opcode
from support.ptx.parser import BITS, Instruction

if TYPE_CHECKING:
    from support.ptx.executor import Compiler
    from support.ptx.lanes import Lanes

ALL_LANES = np.uint32(0xFFFFFFFF)
_CACHES = (
    "cs cg ca cv lu wb wt nc L1__no_allocate L1__evict_last L1__evict_first L1__evict_normal "
    "L1__evict_unchanged "
    "L2__evict_first L2__evict_last L2__evict_normal L2__cache_hint L2__64B L2__128B L2__256B "
    "relaxed acquire release volatile weak gpu cta sys cluster"
)
_SPACES = ("global", "shared", "shared__cta", "param", "const", "local")


class Place:
    """What a load or store says of memory: where, how many elements, of which kind."""

    def __init__(self, compiler: Compiler, i: Instruction, where: str) -> None:
        self.instruction, self.kind = i, i.types[-1]
        self.size = BITS[self.kind] // 8
        self.count = int((i.one_of("v2", "v4", "v8") or "v1")[1:])
        space = i.one_of(*_SPACES)
        self.space = (
            "shared" if space.startswith("shared") else "global" if space == "const" else space
        )
        if self.space == "local":
            raise Fault(
                "unknown opcode",
                f"{i.opcode}: the machine has no local memory; no kernel of ours may need it",
            )
        self.base, self.offset = compiler.address(where)

    def access(self, lanes: Lanes, writes: bool) -> tuple[Access, bool]:
        """The access of the active lanes, and whether it is one to shared memory."""
        addresses = self.base(lanes).astype(np.int64) + self.offset
        shared = self.space == "shared"
        if not self.space:
            shared = bool(np.all(addresses >= SHARED_WINDOW))
            addresses = addresses - SHARED_WINDOW if shared else addresses
        if addresses.ndim == 0:
            addresses = np.broadcast_to(addresses, (lanes.active,))
        return Access(
            self.instruction, addresses, self.size * self.count, writes, lanes.threads
        ), shared


@opcode("ld ldu", "v2 v4 v8 global shared shared__cta param const local " + _CACHES)
def _ld(compiler: Compiler, i: Instruction) -> Run:
    place = Place(compiler, i, i.operands[1])
    kind = place.kind if place.kind[0] == "s" else f"b{BITS[place.kind]}"
    puts = [compiler.put(name, kind) for name in compiler.vector(i.operands[0])]
    constant = compiler.parameter(i.operands[1]) if place.space == "param" else None
    if constant is not None:
        return _ld_parameter(place, constant, puts)
    view = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{place.size}")

    def run(lanes: Lanes) -> None:
        access, shared = place.access(lanes, False)
        if shared:
            values = lanes.shared.read(access, lanes.slots, place.size)
        else:
            values = lanes.memory.read(access, place.size)
        for put, value in zip(puts, values, strict=True):
            put(lanes, value.view(view))

    return run


def _ld_parameter(place: Place, offset: int, puts: list[Callable[..., None]]) -> Run:
    kind = np.dtype(f"{'i' if place.kind[0] == 's' else 'u'}{place.size}")

    def run(lanes: Lanes) -> None:
        values = np.frombuffer(lanes.constants.parameters, kind, place.count, offset)
        for put, value in zip(puts, values, strict=True):
            put(lanes, value)

    return run


@opcode("st", "v2 v4 v8 global shared shared__cta local " + _CACHES)
def _st(compiler: Compiler, i: Instruction) -> Run:
    place = Place(compiler, i, i.operands[0])
    gets = [compiler.get(name, f"b{8 * place.size}") for name in compiler.vector(i.operands[1])]

    def run(lanes: Lanes) -> None:
        access, shared = place.access(lanes, True)
        values = [np.broadcast_to(get(lanes), (lanes.active,)) for get in gets]
        if shared:
            lanes.shared.write(access, lanes.slots, place.size, values)
        else:
            lanes.memory.write(access, place.size, values)

    return run


def _warps(lanes: Lanes, mask: np.ndarray, what: str) -> np.ndarray:
    """The active lanes of each thread's warp as a mask; all of its lanes must have come, with the
    mask of just these.

    Orders the accesses of the warp's threads before against those after.
    """
    present = lanes.present_mask()
    wrong = np.broadcast_to(mask, present.shape) != present
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        asked = int(np.broadcast_to(mask, present.shape)[first])
        detail = f"{what} of lanes {asked:#010x} is reached by {int(present[first]):#010x}"
        raise Fault(
            "divergent shuffle", f"{detail}, thread {int(lanes.threads.thread[first])} among them"
        )
    lanes.sync_warps()
    return present


@opcode("shfl", "sync up down bfly idx")
def _shfl(compiler: Compiler, i: Instruction) -> Run:
    mode = i.one_of("up", "down", "bfly", "idx")
    names = i.operands[0].split("|")
    put, put_valid = (
        compiler.put(names[0], "b32"),
        compiler.put(names[1], "pred") if len(names) > 1 else None,
    )
    value, by, clamp, mask = (compiler.get(operand, "b32") for operand in i.operands[1:5])
    known, mark = compiler.known(i.operands[1]), compiler.mark(names[0])

    def run(lanes: Lanes) -> None:
        present = _warps(lanes, mask(lanes), "shfl.sync")
        lane, b, c = lanes.lane, by(lanes).astype(np.int64) & 31, clamp(lanes).astype(np.int64)
        segment = c >> 8 & 31
        lowest, highest = lane & segment, (lane & segment) | (c & 31 & ~segment)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": lowest | (b & ~segment),
        }[mode]
        valid = source >= highest if mode == "up" else source <= highest
        source = np.where(valid, source, lane)
        if np.any((present >> source.astype(np.uint32)) & 1 == 0):
            raise Fault("divergent shuffle", "a thread reads from a lane that is not there")
        have = True if known is None else lanes.from_lanes(known(lanes), source)
        put(lanes, lanes.from_lanes(value(lanes), source))
        mark(lanes, have)
        if put_valid:
            put_valid(lanes, valid)

    return run


@opcode("vote", "sync all any uni ballot")
def _vote(compiler: Compiler, i: Instruction) -> Run:
    mode = i.one_of("all", "any", "uni", "ballot")
    put = compiler.put(i.operands[0], "b32" if mode == "ballot" else "pred")
    predicate, mask = compiler.get(i.operands[1], "pred"), compiler.get(i.operands[2], "b32")

    def run(lanes: Lanes) -> None:
        present = _warps(lanes, mask(lanes), "vote.sync")
        votes = lanes.ballot(np.broadcast_to(predicate(lanes), present.shape))
        all_, none = votes == present, votes == 0
        put(lanes, {"ballot": votes, "all": all_, "any": ~none, "uni": all_ | none}[mode])

    return run


@opcode("match", "sync any all")
def _match(compiler: Compiler, i: Instruction) -> Run:
    names = i.operands[0].split("|")
    put, put_all = (
        compiler.put(names[0], "b32"),
        compiler.put(names[1], "pred") if len(names) > 1 else None,
    )
    value, mask = compiler.get(i.operands[1], i.types[-1]), compiler.get(i.operands[2], "b32")

    def run(lanes: Lanes) -> None:
        present = _warps(lanes, mask(lanes), "match.sync")
        mine = np.broadcast_to(value(lanes), present.shape)
        equal = np.zeros(present.shape, np.uint32)
        for lane in range(WARP):
            source = np.full(present.shape, lane)
            there = (present >> np.uint32(lane)) & 1 == 1
            equal |= (there & (lanes.from_lanes(mine, source) == mine)).astype(
                np.uint32
            ) << np.uint32(lane)
        if put_all is None:
            put(lanes, equal)
            return
        every = equal == present
        put(lanes, np.where(every, present, np.uint32(0)))
        put_all(lanes, every)

    return run


@opcode("activemask")
def _activemask(compiler: Compiler, i: Instruction) -> Run:
    put = compiler.put(i.operands[0], "b32")
    return lambda lanes: put(lanes, lanes.present_mask())


@opcode("redux", "sync add min max and or xor")
def _redux(compiler: Compiler, i: Instruction) -> Run:
    kind, name = i.types[-1], i.one_of("add", "min", "max", "and", "or", "xor")
    put, value = compiler.put(i.operands[0], kind), compiler.get(i.operands[1], kind)
    mask = compiler.get(i.operands[2], "b32")
    combine = {
        **{"add": np.add, "min": np.minimum, "max": np.maximum},
        **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    }[name]

    def run(lanes: Lanes) -> None:
        present = _warps(lanes, mask(lanes), "redux.sync")
        mine = np.broadcast_to(value(lanes), present.shape)
        begins = np.flatnonzero(np.diff(lanes.warp, prepend=-1))
        of_warp = combine.reduceat(mine, begins, dtype=mine.dtype)
        put(lanes, np.repeat(of_warp, np.diff([*begins, len(mine)])))

    return run


@opcode("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared__cta")
def _ldmatrix(compiler: Compiler, i: Instruction) -> Run:
    puts = [compiler.put(name, "b32") for name in compiler.vector(i.operands[0])]
    base, offset = compiler.address(i.operands[1])
    transposed = "trans" in i.modifiers

    def run(lanes: Lanes) -> None:
        _warps(lanes, ALL_LANES, "ldmatrix")
        addresses = (base(lanes).astype(np.int64) + offset).reshape(-1, WARP)
        lane = np.arange(WARP)
        for j, put in enumerate(puts):
            # of matrix j: eight lanes have the address of a row each
            rows = addresses[:, 8 * j : 8 * j + 8]
            if not transposed:
                at = rows[:, lane // 4] + lane % 4 * 4
                values = lanes.shared.read(_of_all(lanes, i, at, 4), lanes.slots, 4)[0]
            else:
                pair = [rows[:, 2 * (lane % 4) + k] + lane // 4 * 2 for k in (0, 1)]
                low, high = (
                    lanes.shared.read(_of_all(lanes, i, at, 2), lanes.slots, 2)[0] for at in pair
                )
                values = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
            put(lanes, values)

    return run


@opcode("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared__cta")
def _stmatrix(compiler: Compiler, i: Instruction) -> Run:
    base, offset = compiler.address(i.operands[0])
    gets = [compiler.get(name, "b32") for name in compiler.vector(i.operands[1])]
    transposed = "trans" in i.modifiers

    def run(lanes: Lanes) -> None:
        _warps(lanes, ALL_LANES, "stmatrix")
        addresses = (base(lanes).astype(np.int64) + offset).reshape(-1, WARP)
        lane = np.arange(WARP)

        def write(at: np.ndarray, size: int, values: np.ndarray) -> None:
            access = _of_all(lanes, i, at, size, writes=True)
            lanes.shared.write(access, lanes.slots, size, [values])

        for j, get in enumerate(gets):
            # of matrix j: eight lanes have the address of a row each
            rows = addresses[:, 8 * j : 8 * j + 8]
            values = np.broadcast_to(get(lanes), (lanes.active,))
            if not transposed:
                write(rows[:, lane // 4] + lane % 4 * 4, 4, values)
                continue
            for k in (0, 1):
                half = (values >> np.uint32(16 * k)).astype(np.uint16)
                write(rows[:, 2 * (lane % 4) + k] + lane // 4 * 2, 2, half)

    return run


def _of_all(
    lanes: Lanes, i: Instruction, addresses: np.ndarray, size: int, writes: bool = False
) -> Access:
    return Access(i, addresses.reshape(-1), size, writes, lanes.threads)
