"""Reads PTX: the entries of a module as lists of instructions, with what a launch must know of
each.

Instructions keep their line in the PTX and, where the compiler left `.loc` lines, the line of the
source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

BITS = {
    **{
        "pred": 1,
        "b8": 8,
        "u8": 8,
        "s8": 8,
        "b16": 16,
        "u16": 16,
        "s16": 16,
        "f16": 16,
        "bf16": 16,
    },
    **{"b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32},
    **{"b64": 64, "u64": 64, "s64": 64, "f64": 64},
}
UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
ENDS_A_BLOCK = ("bra", "ret", "exit", "bar", "barrier", "trap")
_WRITES_NOTHING = (
    *ENDS_A_BLOCK,
    "st",
    "red",
    "membar",
    "fence",
    "prefetch",
    "stmatrix",
    "nanosleep",
)

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+).*?([\w$]+)\s*(?:\[(\d+)\])?\s*$", re.DOTALL
)
_ARRAY = re.compile(
    r"\.(shared|global|const)\s+(?:\.align\s+(\d+)\s+)?\.([busf]\d+)\s+([\w$]+)(?:\[(\d*)\])?"
    r"(?:\s*=\s*\{?([^;}]*)\}?)?\s*;"
)
_LABEL = re.compile(r"\s*([\w$]+):(?!:)")
_SCOPE = re.compile(r"\s*[{}]")
_STATEMENT = re.compile(r"\s*([^;{]*(?:\{[^}]*\}[^;{]*)*);")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_GUARD = re.compile(r"@(!?)(%\w+)\s+(.*)", re.DOTALL)
_REGISTERS = re.compile(r"%[\w$]+")


class UnreadablePtx(Exception):
    """PTX with something that the parser does not know."""


def split_operands(text: str) -> tuple[str, ...]:
    """`"{%r1, %r2}, [%rd1+4]"` as its operands."""
    return tuple(part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", text) if part.strip())


@dataclass(frozen=True)
class Instruction:
    """One statement, such as `@!%p1 ld.global.v2.u32 {%r1, %r2}, [%rd1+8];`."""

    line: int
    source: str  # "file.cu:12", or "" where the compiler does not say
    guard: str
    negated: bool
    opcode: str
    operands: tuple[str, ...]

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.replace("::", "__").split("."))

    @property
    def base(self) -> str:
        return self.parts[0]

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts[1:] if part in BITS)

    @cached_property
    def modifiers(self) -> frozenset[str]:
        return frozenset(part for part in self.parts[1:] if part not in BITS)

    def one_of(self, *modifiers: str) -> str:
        """The modifier of these that it has, or an empty string."""
        return next((each for each in modifiers if each in self.modifiers), "")

    @cached_property
    def written(self) -> frozenset[str]:
        """The registers that it writes."""
        first = self.operands[:1] if self.base not in _WRITES_NOTHING else ()
        return frozenset(_REGISTERS.findall(" ".join(first)))

    @cached_property
    def read(self) -> frozenset[str]:
        """The registers that it reads, its guard and special registers among them."""
        sources = self.operands if self.base in _WRITES_NOTHING else self.operands[1:]
        return frozenset(_REGISTERS.findall(" ".join((self.guard, *sources))))

    def __str__(self) -> str:
        of = f" ({self.source})" if self.source else ""
        return f"line {self.line}{of}: {self.opcode} {', '.join(self.operands)}"


@dataclass
class Array:
    """A variable of the module; `initial`: its bytes, None for shared memory."""

    name: str
    size: int
    align: int
    initial: bytes | None = None


@dataclass(eq=False)
class Kernel:
    """One entry: its parameters, registers and code, which `blocks` divides where control may come
    or go."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    parameter_bytes: int = 0
    max_threads: int = 1024
    registers: dict[str, str] = field(default_factory=dict)  # type
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # offset of each array
    static_shared: int = 0
    variables: dict[str, Array] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> dict[int, int]:
        """Where each basic block begins, and where it ends."""
        starts = {0, *self.labels.values()}
        starts |= {
            i + 1 for i, instruction in enumerate(self.code) if instruction.base in ENDS_A_BLOCK
        }
        ordered = sorted(start for start in starts if start < len(self.code))
        return dict(zip(ordered, [*ordered[1:], len(self.code)], strict=True))

    def successors(self, start: int) -> Iterator[int]:
        last = self.code[self.blocks[start] - 1]
        if last.base == "bra":
            yield self.labels[last.operands[0]]
        if last.guard or last.base not in ("bra", "ret", "exit", "trap"):
            yield self.blocks[start]

    @cached_property
    def doubtful(self) -> frozenset[str]:
        """Registers that some path reads before it has written them for certain."""
        every = frozenset(self.registers)
        known = {start: every for start in self.blocks}
        known[0] = frozenset()
        doubtful: set[str] = set()
        waiting = list(self.blocks)
        while waiting:
            start = waiting.pop()
            after = set(known[start])
            for instruction in self.code[start : self.blocks[start]]:
                if not instruction.guard:
                    after |= instruction.written
            for following in self.successors(start):
                if following in known and not known[following] <= after:
                    known[following] &= after
                    waiting.append(following)
        for start, end in self.blocks.items():
            after = set(known[start])
            for instruction in self.code[start:end]:
                doubtful |= (instruction.read & every) - after
                if not instruction.guard:
                    after |= instruction.written
        return frozenset(doubtful)

    @cached_property
    def watched(self) -> frozenset[str]:
        """The doubtful registers and all that are computed from them: a launch knows which threads
        have them.

        Triton lets whole warps shuffle and add what only some lanes have loaded, and drops what the
        others get.
        """
        watched = set(self.doubtful)
        size = -1
        while len(watched) > size:
            size = len(watched)
            for instruction in self.code:
                if not watched.isdisjoint(instruction.read):
                    watched |= instruction.written
        return frozenset(watched)


class Module(Mapping[str, Kernel]):
    """The kernels of a PTX file by their names there; each is read when it is first asked for.

    Raises:
        UnreadablePtx: a kernel has a directive that is not known.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._files = {number: path.rpartition("/")[2] for number, path in _FILE.findall(text)}
        self._code = re.sub(
            r"/\*.*?\*/|//[^\n]*", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL
        )
        self._entries = {match[1]: match for match in _ENTRY.finditer(self._code)}
        self._kernels: dict[str, Kernel] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = _entry(
                self._code, self._entries[name], list(_arrays(self._code)), self._files
            )
        return self._kernels[name]

    def edited(self, name: str, change: Callable[[str], str]) -> Kernel:
        """The kernel as it is after a change of its text, to plant a fault."""
        begin = self._entries[name].start()
        rest = [match.start() for match in self._entries.values() if match.start() > begin]
        end = min(rest, default=len(self._code))
        changed = change(self._code[begin:end])
        if changed == self._code[begin:end]:
            raise LookupError(f"the change of {name} changes nothing")
        edited = Module(self._text)
        edited._code = self._code[:begin] + changed + self._code[end:]
        edited._entries = {name: next(m for m in _ENTRY.finditer(edited._code) if m[1] == name)}
        return edited[name]


def _arrays(text: str) -> Iterator[Array]:
    for space, align, kind, name, count, values in _ARRAY.findall(text):
        width = BITS[kind] // 8
        numbers = (
            [int(value, 0) % (1 << 8 * width) for value in split_operands(values)]
            if values.strip()
            else []
        )
        size = width * int(count or (0 if space == "shared" else 1))
        initial = b"".join(number.to_bytes(width, "little") for number in numbers).ljust(
            size, b"\0"
        )
        yield Array(name, size, int(align or width), None if space == "shared" else initial)


def _entry(text: str, match: re.Match[str], arrays: list[Array], files: dict[str, str]) -> Kernel:
    kernel = Kernel(match[1])
    close = text.index(")", match.end())
    _read_parameters(kernel, text[match.end() : close])
    begin = text.index("{", close)
    threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", text[close:begin])
    kernel.max_threads = int(threads[1]) if threads else 1024
    _place_arrays(kernel, arrays)
    _read_body(kernel, text, begin + 1, files)
    return kernel


def _read_parameters(kernel: Kernel, text: str) -> None:
    for parameter in filter(None, map(str.strip, text.split(","))):
        found = _PARAMETER.match(parameter)
        if found is None:
            raise UnreadablePtx(f"{kernel.name}: parameter {parameter}")
        align, kind, name, count = found.groups()
        size = BITS[kind] // 8 * int(count or 1)
        # .ptr .align is of what it points to
        align = int(align) if align and count else BITS[kind] // 8
        offset = -(-kernel.parameter_bytes // align) * align
        kernel.parameters[name] = offset, size
        kernel.parameter_bytes = offset + size


def _place_arrays(kernel: Kernel, arrays: list[Array]) -> None:
    """Static shared arrays one after another, then the dynamic ones, which all begin where those
    end."""
    for array in arrays:
        if array.initial is not None:
            kernel.variables[array.name] = array
        elif array.size:
            kernel.shared[array.name] = -(-kernel.static_shared // array.align) * array.align
            kernel.static_shared = kernel.shared[array.name] + array.size
    for array in arrays:
        if array.initial is None and not array.size:
            kernel.shared[array.name] = -(-kernel.static_shared // 16) * 16


def _read_body(kernel: Kernel, text: str, position: int, files: dict[str, str]) -> None:
    depth, source, line = 1, "", text.count("\n", 0, position) + 1
    while depth:
        label, scope = _LABEL.match(text, position), _SCOPE.match(text, position)
        loc = re.compile(r"\s*\.(?:loc|file)\b([^\n]*)").match(text, position)
        found = label or scope or loc or _STATEMENT.match(text, position)
        if found is None:
            raise UnreadablePtx(f"{kernel.name}: line {line}: {text[position : position + 80]!r}")
        begin = line + text.count("\n", position, found.end() - len(found[0].lstrip()))
        line, position = line + text.count("\n", position, found.end()), found.end()
        if label:
            kernel.labels[label[1]] = len(kernel.code)
        elif scope:
            depth += 1 if "{" in scope[0] else -1
        elif loc:
            place = _LOC.match(loc[0].strip())
            source = f"{files.get(place[1], '?')}:{place[2]}" if place else source
        else:
            _read_statement(kernel, found[1].strip(), begin, source)


def _read_statement(kernel: Kernel, text: str, line: int, source: str) -> None:
    if text.startswith(".reg"):
        kind, names = text[len(".reg") :].strip()[1:].split(maxsplit=1)
        for name in split_operands(names):
            several = re.fullmatch(r"(.*)<(\d+)>", name)
            each = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]
            kernel.registers |= dict.fromkeys(each, kind)
    elif text and not text.startswith((".pragma", ".shared")):
        guard = _GUARD.match(text)
        statement = guard[3] if guard else text
        if statement.startswith("."):
            raise UnreadablePtx(f"{kernel.name}: line {line}: directive {statement}")
        opcode, *rest = statement.split(maxsplit=1)
        operands = split_operands(rest[0]) if rest else ()
        name, negated = (guard[2], bool(guard[1])) if guard else ("", False)
        kernel.code.append(Instruction(line, source, name, negated, opcode, operands))
