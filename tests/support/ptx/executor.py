"""Runs a kernel's PTX on the CPU: numpy over the threads of many blocks at once.

The threads of a batch of blocks run together, the ones that stand earliest in the code first, so
that those which went apart meet again; a barrier is passed when every thread of the block that has
not ended waits at it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from support.ptx import arithmetic, opcodes_memory  # noqa: F401  (enters its opcodes into the table)
from support.ptx.checks import Fault, GlobalMemory
from support.ptx.lanes import Constants, Lanes, Launch, dtype_of
from support.ptx.opcodes import HALVES, Run, built
from support.ptx.parser import BITS, ENDS_A_BLOCK, UINT, Instruction, Kernel, split_operands

_LANES = 4096  # that run together: numpy's overhead against the cache
_MOST_STEPS = 5_000_000  # basic blocks of a batch, after which a loop counts as endless
# what nobody wrote may go nowhere from here
_NEED_KNOWN = ("ld", "ldu", "st", "vote", "match", "redux", "ldmatrix", "stmatrix")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")

Getter = Callable[["Lanes"], np.ndarray]
Setter = Callable[["Lanes", np.ndarray], None]


def _demand(name: str, known: np.ndarray) -> None:
    if not known.all():
        raise Fault(
            "unwritten",
            f"uses register {name}, to which {int((~known).sum())} of the threads wrote nothing",
        )


@dataclass(frozen=True)
class Options:
    """How launches run.

    Args:
        checks: look for races (bounds, alignment, unwritten bytes, barriers are always looked at).
        noise_ulp: by how many last places approximate functions may be off.
        order: seed of the order in which blocks run; None for first to last.
        only: which blocks run, given how many there are; None for all.
    """

    checks: bool = True
    noise_ulp: int = 0
    order: int | None = None
    only: Callable[[int], Sequence[int]] | None = None


class Compiler:
    """Turns the operands of one kernel into functions over the active lanes."""

    def __init__(self, kernel: Kernel, noise_ulp: int) -> None:
        self.kernel, self.noise_ulp = kernel, noise_ulp
        self.rows: dict[str, int] = {}
        used: Counter[int] = Counter()
        for name, kind in kernel.registers.items():
            self.rows[name] = used[BITS[kind]]
            used[BITS[kind]] += 1
        self._blocks: dict[int, list[tuple[Instruction, Run]]] = {}

    def block(self, start: int) -> list[tuple[Instruction, Run]]:
        """The instructions of a basic block but for what ends it, each with its function."""
        if start not in self._blocks:
            instructions = self.kernel.code[start : self.kernel.blocks[start]]
            body = [i for i in instructions if i.base not in ENDS_A_BLOCK]
            self._blocks[start] = [(i, self._guarded(i)) for i in body]
        return self._blocks[start]

    def _guarded(self, instruction: Instruction) -> Run:
        try:
            run = built(self, instruction)
        except Fault as fault:
            raise fault.at(self.kernel.name, instruction) from None
        run = self._watched(instruction, run)
        return self._under_guard(instruction, run) if instruction.guard else run

    def _watched(self, instruction: Instruction, run: Run) -> Run:
        """Keeps the books of which threads have the registers that are watched; a shuffle does so
        by itself."""
        sources = sorted(instruction.read & self.kernel.watched - {instruction.guard})
        targets = sorted(instruction.written & self.kernel.watched)
        if (not sources and not targets) or instruction.base == "shfl":
            return run

        def watched(lanes: Lanes) -> None:
            known = [lanes.pick(lanes.known[name]) for name in sources]
            if instruction.base in _NEED_KNOWN:
                for name, each in zip(sources, known, strict=True):
                    _demand(name, each)
            run(lanes)
            at = slice(None) if lanes.index is None else lanes.index
            for name in targets:
                lanes.known[name][at] = np.logical_and.reduce(known) if known else True

        return watched

    def known(self, name: str) -> Getter | None:
        """Which threads have a register; None if all that come here."""
        if name not in self.kernel.watched:
            return None
        return lambda lanes: lanes.pick(lanes.known[name])

    def mark(self, name: str) -> Setter:
        """Sets which threads have a register from now on."""

        def put(lanes: Lanes, known: np.ndarray) -> None:
            lanes.known[name][slice(None) if lanes.index is None else lanes.index] = known

        return put if name in self.kernel.watched else lambda lanes, known: None

    def _under_guard(self, instruction: Instruction, run: Run) -> Run:
        holds = self.guard(instruction)

        def guarded(lanes: Lanes) -> None:
            wanted, index = holds(lanes), lanes.index
            if wanted.all():
                run(lanes)
            elif wanted.any():
                lanes.activate(np.flatnonzero(wanted) if index is None else index[wanted])
                run(lanes)
                lanes.activate(index)

        return guarded

    def guard(self, instruction: Instruction) -> Getter:
        name = instruction.guard
        predicate, known = self.get(name, "pred"), self.known(name)
        if known is not None:
            value = predicate

            def predicate(lanes: Lanes) -> np.ndarray:
                _demand(name, known(lanes))
                return value(lanes)

        return (lambda lanes: ~predicate(lanes)) if instruction.negated else predicate

    def vector(self, operand: str) -> tuple[str, ...]:
        """The names in `{a, b}`, or the one name."""
        return split_operands(operand.strip("{} ")) if operand.startswith("{") else (operand,)

    def get(self, operand: str, kind: str) -> Getter:
        """What an operand holds as `kind`; 16-bit floats as float32."""
        if kind in HALVES:
            raw = self.get(operand, f"b{BITS[kind]}")
            return lambda lanes: arithmetic.widen(np.asarray(raw(lanes)), kind)
        if operand.startswith("!"):
            inverse = self.get(operand[1:], kind)
            return lambda lanes: ~inverse(lanes)
        if operand in self.kernel.registers:
            return self._get_register(operand, kind)
        if operand.startswith("%"):
            return lambda lanes: lanes.special(operand).astype(dtype_of(kind))
        if operand in self.kernel.parameters:
            offset = self.kernel.parameters[operand][0]
            return lambda lanes: np.uint64(lanes.constants.parameters_at + offset)
        if operand in self.kernel.variables:
            return lambda lanes: np.uint64(lanes.constants.addresses[operand])
        literal = self._literal(operand, kind)
        return lambda lanes: literal

    def _get_register(self, name: str, kind: str) -> Getter:
        row, own = self.rows[name], self.kernel.registers[name]
        if BITS[own] < BITS[kind]:
            raise Fault("unknown opcode", f"{name} of type {own} as {kind}")
        if BITS[own] == BITS[kind]:
            get = lambda lanes: lanes.pick(lanes.banks[kind][row])  # noqa: E731
        else:
            bank, to, view = f"u{BITS[own]}", UINT[BITS[kind]], dtype_of(kind)
            get = lambda lanes: lanes.pick(lanes.banks[bank][row]).astype(to).view(view)  # noqa: E731
        return get

    def _literal(self, text: str, kind: str) -> np.generic:
        if kind == "pred":
            return np.bool_(text in ("true", "1", "-1"))
        if text in self.kernel.shared:
            bits = self.kernel.shared[text]
        elif text[:2] in ("0f", "0F", "0d", "0D"):
            bits = int(text[2:], 16)
        else:
            try:
                bits = int(text.rstrip("U"), 0)
            except ValueError:
                raise Fault("unknown opcode", f"operand {text}") from None
        return np.array(bits % (1 << BITS[kind]), UINT[BITS[kind]]).view(dtype_of(kind))[()]

    def put(self, name: str, kind: str) -> Setter:
        """Writes values of `kind` to a register; a wider one is filled with zeros or the sign."""
        if name == "_":
            return lambda lanes, values: None
        if kind in HALVES:
            raw = self.put(name, f"b{BITS[kind]}")
            return lambda lanes, values: raw(lanes, arithmetic.narrow(values, kind))
        row, own = self.rows[name], self.kernel.registers[name]
        bank = kind if BITS[own] == BITS[kind] else f"{'s' if kind[0] == 's' else 'u'}{BITS[own]}"

        def put(lanes: Lanes, values: np.ndarray) -> None:
            at = slice(None) if lanes.index is None else lanes.index
            lanes.banks[bank][row][at] = values

        return put

    def address(self, operand: str) -> tuple[Getter, int]:
        """The base and the offset of `[base+offset]`."""
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise Fault("unknown opcode", f"address {operand}")
        base, offset = match[1], int(match[2], 0) if match[2] else 0
        return self.get(
            base, "u32" if self.kernel.registers.get(base, "b64").endswith("32") else "u64"
        ), offset

    def parameter(self, operand: str) -> int | None:
        """The offset of `[parameter+offset]` among the parameters; None for an address in a
        register."""
        match = _ADDRESS.fullmatch(operand)
        if match is None or match[1] not in self.kernel.parameters:
            return None
        return self.kernel.parameters[match[1]][0] + (int(match[2], 0) if match[2] else 0)


@functools.cache
def compiler_of(kernel: Kernel, noise_ulp: int) -> Compiler:
    return Compiler(kernel, noise_ulp)


def run_launch(
    kernel: Kernel, launch: Launch, parameters: bytes, memory: GlobalMemory, options: Options
) -> None:
    """Runs a launch and fills in what it did.

    Raises:
        Fault: the kernel does what it may not; names the instruction.
    """
    compiler, count = compiler_of(kernel, options.noise_ulp), int(np.prod(launch.grid))
    blocks = np.arange(count) if options.only is None else np.asarray(options.only(count))
    if options.order is not None:
        blocks = np.random.default_rng(options.order).permutation(blocks)
    together = max(1, _LANES // launch.block)
    if options.order is not None:  # other neighbours too
        together = max(1, together // (options.order % 3 + 1))
    constants = Constants(kernel, parameters, memory)
    try:
        for begin in range(0, len(blocks), together):
            _Batch(compiler, launch, blocks[begin : begin + together], constants, options).run()
        memory.log.check()
    except Fault as fault:
        raise fault.at(launch.kernel, fault.instruction) from None
    launch.bytes_read, launch.bytes_written = memory.bytes_read, memory.bytes_written


class _Batch:
    """Blocks that run together: which of their threads stand where."""

    def __init__(
        self,
        compiler: Compiler,
        launch: Launch,
        blocks: np.ndarray,
        constants: Constants,
        options: Options,
    ) -> None:
        self.compiler, self.kernel, self.launch = compiler, compiler.kernel, launch
        self.lanes = Lanes(self.kernel, launch, blocks, constants, options.checks)
        self.visits: Counter[int] = Counter()  # threads that came to each basic block
        self.ready = {0: np.arange(self.lanes.count)}
        self.waiting: dict[int, np.ndarray] = {}  # by where they go on

    def run(self) -> None:
        with np.errstate(all="ignore"):
            for _ in range(_MOST_STEPS):
                if self.ready:
                    self._run_block(min(self.ready))
                elif self.waiting:
                    self._pass_barrier()
                else:
                    return self._finish()
        last = self.kernel.code[min(self.ready or self.waiting)]
        raise Fault("endless", f"not at its end after {_MOST_STEPS} basic blocks").at(
            self.launch.kernel, last
        )

    def _finish(self) -> None:
        self.lanes.shared.log.check()
        for start, threads in self.visits.items():
            for instruction in self.kernel.code[start : self.kernel.blocks[start]]:
                self.launch.opcodes[instruction.opcode] += threads

    def _run_block(self, start: int) -> None:
        index, end = self.ready.pop(start), self.kernel.blocks[start]
        self.lanes.activate(None if len(index) == self.lanes.count else index)
        body = self.compiler.block(start)
        for instruction, run in body:
            try:
                run(self.lanes)
            except Fault as fault:
                raise fault.at(self.launch.kernel, instruction) from None
        self.visits[start] += len(index)
        self._leave_block(self.kernel.code[end - 1], index, end)

    def _leave_block(self, last: Instruction, index: np.ndarray, end: int) -> None:
        if last.base not in ENDS_A_BLOCK:
            return self._arrive(end, index)
        going, staying = index, index[:0]
        if last.guard:
            holds = self.compiler.guard(last)(self.lanes)
            going, staying = index[holds], index[~holds]
        self._arrive(end, staying)
        if not len(going):
            return None
        if last.base == "bra":
            return self._arrive(self.kernel.labels[last.operands[0]], going)
        if last.base == "trap":
            raise Fault("trap", "the kernel stopped itself").at(self.launch.kernel, last)
        if last.base in ("bar", "barrier"):
            return self._arrive_at_barrier(last, going, end)
        return None

    def _arrive(self, at: int, index: np.ndarray) -> None:
        if not len(index) or at >= len(self.kernel.code):
            return
        there = self.ready.get(at)
        self.ready[at] = index if there is None else np.sort(np.concatenate([there, index]))

    def _arrive_at_barrier(self, barrier: Instruction, index: np.ndarray, end: int) -> None:
        if "warp" in barrier.modifiers:
            self._pass_warp_barrier(barrier, index)
            return self._arrive(end, index)
        if len(barrier.operands) != 1 or not barrier.modifiers <= {"sync", "cta", "aligned"}:
            raise Fault("unknown opcode", f"{barrier.opcode} of {barrier.operands}").at(
                self.launch.kernel, barrier
            )
        self.waiting[end] = np.sort(np.concatenate([self.waiting.get(end, index[:0]), index]))
        return None

    def _pass_warp_barrier(self, barrier: Instruction, index: np.ndarray) -> None:
        self.lanes.activate(index)
        mask, present = (
            self.compiler.get(barrier.operands[0], "b32")(self.lanes),
            self.lanes.present_mask(),
        )
        if np.any(mask != present):
            detail = (
                f"a barrier of lanes {int(np.max(mask)):#010x} is reached by "
                f"{int(present.min()):#010x}"
            )
            raise Fault("divergent barrier", detail).at(self.launch.kernel, barrier)
        self.lanes.sync_warps()

    def _pass_barrier(self) -> None:
        """Every thread that has not ended waits: those of one block must wait at one barrier."""
        slots = {at: np.unique(self.lanes.all_slots[index]) for at, index in self.waiting.items()}
        every = np.concatenate(list(slots.values()))
        if len(np.unique(every)) < len(every):
            barriers = " and ".join(str(self.kernel.code[at - 1]) for at in slots)
            last = self.kernel.code[max(slots) - 1]
            raise Fault("divergent barrier", f"threads of one block wait at {barriers}").at(
                self.launch.kernel, last
            )
        self.lanes.epochs[every] += 1
        self.ready, self.waiting = self.waiting, {}
