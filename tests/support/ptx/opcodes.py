"""What each opcode does: a table from its first word to a builder of a function over the active
lanes of a run.

A builder takes the compiler, which turns operands into getters and setters, and the instruction.
Modifiers that its row of the table does not name are a Fault, so that no rounding or saturation is
ever passed over.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from support.ptx import arithmetic
from support.ptx.arithmetic import ROUNDINGS, flush, fma
from support.ptx.checks import SHARED_WINDOW, Fault, noise
from support.ptx.parser import BITS, UINT, Instruction

if TYPE_CHECKING:
    from support.ptx.executor import Compiler
    from support.ptx.lanes import Lanes

Run = Callable[["Lanes"], None]
Builder = Callable[["Compiler", Instruction], Run]
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


class Opcode(NamedTuple):
    build: Builder
    modifiers: frozenset[str]


OPCODES: dict[str, Opcode] = {}


def opcode(names: str, modifiers: str = "") -> Callable[[Builder], Builder]:
    """Enters a builder into the table under each of `names`."""

    def enter(build: Builder) -> Builder:
        for name in names.split():
            OPCODES[name] = Opcode(build, frozenset(modifiers.split()))
        return build

    return enter


def built(compiler: Compiler, instruction: Instruction) -> Run:
    """The function of an instruction; raises a Fault for one that the table does not hold."""
    found = OPCODES.get(instruction.base)
    if found is None:
        raise Fault(
            "unknown opcode", f"{instruction.opcode} is not in the table of support/ptx/opcodes.py"
        )
    unknown = instruction.modifiers - found.modifiers
    if unknown:
        raise Fault(
            "unknown opcode",
            f"{instruction.base} has no modifier {', '.join(sorted(unknown))} here",
        )
    return found.build(compiler, instruction)


def is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


def elementwise(
    compiler: Compiler, i: Instruction, kinds: list[str], to: str, function: Callable[..., Any]
) -> Run:
    """Sources of `kinds` through `function` into a destination of kind `to`."""
    sources = [
        compiler.get(operand, kind) for operand, kind in zip(i.operands[1:], kinds, strict=True)
    ]
    put = compiler.put(i.operands[0], to)
    if len(sources) == 2:
        first, second = sources
        return lambda lanes: put(lanes, function(first(lanes), second(lanes)))
    return lambda lanes: put(lanes, function(*[source(lanes) for source in sources]))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.any(b == 0):
        raise Fault("division by zero", "of integers")
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(quotient.dtype)  # towards zero


_INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
}


def _float_function(i: Instruction) -> Callable[..., Any]:
    rounding = i.one_of(*ROUNDINGS) or "rn"
    nan = "NaN" in i.modifiers
    if i.base in ("add", "sub", "mul") and rounding != "rn":
        return {
            "add": lambda a, b: fma(a, np.ones_like(a), b, rounding),
            "sub": lambda a, b: fma(a, np.ones_like(a), -b, rounding),
            "mul": lambda a, b: fma(a, b, np.negative(np.zeros_like(a)), rounding),
        }[i.base]
    if rounding != "rn":
        raise Fault("unknown opcode", i.opcode)
    return {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "min": np.minimum if nan else np.fmin,
        "max": np.maximum if nan else np.fmax,
    }[i.base]


def _finished(i: Instruction, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its inputs and result flushed (.ftz) and its result in [0, 1] (.sat)."""
    if "ftz" in i.modifiers:
        inner = function

        def function(*values: np.ndarray) -> np.ndarray:
            return flush(inner(*map(flush, values)))

    if "sat" not in i.modifiers:
        return function
    unbounded = function

    def saturated(*values: np.ndarray) -> np.ndarray:
        result = unbounded(*values)
        return np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(result.dtype)

    return saturated


@opcode("add sub min max rem", "rn rz rm rp ftz sat NaN")
def _add(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    if is_float(kind):
        return elementwise(compiler, i, [kind] * 2, kind, _finished(i, _float_function(i)))
    return elementwise(compiler, i, [kind] * 2, kind, _INTEGER[i.base])


@opcode("div", "rn full approx ftz")
def _div(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    if not is_float(kind):
        return elementwise(compiler, i, [kind] * 2, kind, _divide)
    ulp = 0 if "rn" in i.modifiers else compiler.noise_ulp

    def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = np.divide(a, b)
        if not ulp:
            return result
        bits = np.asarray(a).view(np.uint32) ^ (np.asarray(b).view(np.uint32) << np.uint32(1))
        return _disturbed(result, bits, ulp, a != b)

    return elementwise(compiler, i, [kind] * 2, kind, _finished(i, quotient))


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * BITS[kind]}"


@opcode("mul", "rn rz rm rp ftz sat lo hi wide")
def _mul(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    if is_float(kind):
        return elementwise(compiler, i, [kind] * 2, kind, _finished(i, _float_function(i)))
    if "wide" in i.modifiers:
        return elementwise(compiler, i, [kind] * 2, _wide(kind), _product_of(kind))
    product = arithmetic.high_product if "hi" in i.modifiers else np.multiply
    return elementwise(compiler, i, [kind] * 2, kind, product)


def _product_of(kind: str) -> Callable[..., Any]:
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{BITS[kind] // 4}").type
    return lambda a, b: a.astype(wide) * b.astype(wide)


@opcode("mad fma", "rn rz rm rp ftz sat lo hi wide")
def _mad(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    if kind in HALVES:
        return elementwise(compiler, i, [kind] * 3, kind, _finished(i, arithmetic.fma_odd))
    if is_float(kind):
        rounding = i.one_of(*ROUNDINGS)
        return elementwise(
            compiler, i, [kind] * 3, kind, _finished(i, lambda a, b, c: fma(a, b, c, rounding))
        )
    if "wide" in i.modifiers:
        product = _product_of(kind)
        kinds, to = [kind, kind, _wide(kind)], _wide(kind)
    else:
        product = arithmetic.high_product if "hi" in i.modifiers else np.multiply
        kinds, to = [kind] * 3, kind
    return elementwise(compiler, i, kinds, to, lambda a, b, c: product(a, b) + c)


@opcode("neg abs", "ftz")
def _neg(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    return elementwise(
        compiler, i, [kind], kind, _finished(i, {"neg": np.negative, "abs": np.abs}[i.base])
    )


@opcode("copysign")
def _copysign(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    return elementwise(
        compiler, i, [kind] * 2, kind, lambda sign, magnitude: np.copysign(magnitude, sign)
    )


_SPECIAL = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


def _disturbed(result: np.ndarray, bits: np.ndarray, ulp: int, inexact: np.ndarray) -> np.ndarray:
    shifted = (result.view(np.int32) + noise(bits, ulp)).view(np.float32)
    return np.where(np.isfinite(result) & (result != 0) & inexact, shifted, result)


@opcode("ex2 lg2 rcp sqrt rsqrt tanh sin cos", "approx ftz rn")
def _special(compiler: Compiler, i: Instruction) -> Run:
    kind, exact, function = i.types[-1], "rn" in i.modifiers, _SPECIAL[i.base]
    ulp = 0 if exact else compiler.noise_ulp

    def narrow(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        result = function(x.astype(np.float64)).astype(np.float32)
        return _disturbed(result, x.view(np.uint32), ulp, result != 1) if ulp else result

    def double(x: np.ndarray) -> np.ndarray:
        result = np.asarray(function(x))
        if exact:
            return result
        # what the chip gives
        return (result.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)

    return elementwise(compiler, i, [kind], kind, _finished(i, double if kind == "f64" else narrow))


@opcode("testp", "finite infinite number notanumber normal subnormal")
def _testp(compiler: Compiler, i: Instruction) -> Run:
    (test,) = i.modifiers

    def normal(x: np.ndarray) -> np.ndarray:
        return np.isfinite(x) & (flush(x) != 0)

    tests: dict[str, Callable[..., Any]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": normal,
        "subnormal": lambda x: np.isfinite(x) & (x != 0) & ~normal(x),
    }
    return elementwise(compiler, i, [i.types[-1]], "pred", tests[test])


_COMPARE = {
    **{"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le},
    **{
        "gt": operator.gt,
        "ge": operator.ge,
        "lo": operator.lt,
        "ls": operator.le,
        "hi": operator.gt,
    },
    **{"hs": operator.ge},
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, kind: str) -> Callable[..., Any]:
    if not is_float(kind):
        return _COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):  # true where one is NaN
        ordered = _COMPARE[name[:2]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return _COMPARE[name]


@opcode("setp", "ftz and or xor num nan equ neu ltu leu gtu geu " + " ".join(_COMPARE))
def _setp(compiler: Compiler, i: Instruction) -> Run:
    kind, compare = i.types[-1], _comparison(i.parts[1], i.types[-1])
    if "ftz" in i.modifiers:
        unflushed = compare
        compare = lambda a, b: unflushed(flush(a), flush(b))  # noqa: E731
    a, b = (compiler.get(operand, kind) for operand in i.operands[1:3])
    combine = _COMBINE.get(i.one_of(*_COMBINE))
    third = compiler.get(i.operands[3], "pred") if combine else None
    puts = [compiler.put(name, "pred") for name in i.operands[0].split("|")]

    def run(lanes: Lanes) -> None:
        result = compare(a(lanes), b(lanes))
        results = [result, ~result][: len(puts)]
        if combine and third:
            last = third(lanes)
            results = [combine(each, last) for each in results]
        for put, each in zip(puts, results, strict=True):
            put(lanes, each)

    return run


@opcode("selp")
def _selp(compiler: Compiler, i: Instruction) -> Run:
    kind = f"b{BITS[i.types[-1]]}"
    return elementwise(compiler, i, [kind, kind, "pred"], kind, lambda a, b, p: np.where(p, a, b))


@opcode("and or xor")
def _bitwise(compiler: Compiler, i: Instruction) -> Run:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.base]
    return elementwise(compiler, i, [i.types[-1]] * 2, i.types[-1], function)


@opcode("not cnot")
def _not(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    function = np.invert if i.base == "not" else (lambda x: (x == 0).astype(x.dtype))
    return elementwise(compiler, i, [kind], kind, function)


@opcode("shl shr")
def _shift(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    width, move = BITS[kind], np.left_shift if i.base == "shl" else np.right_shift

    def shifted(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        kept = move(x, np.minimum(by, width - 1).astype(x.dtype))
        # a sign goes on for ever
        gone = move(kept, x.dtype.type(1)) if kind[0] == "s" else kept.dtype.type(0)
        return np.where(by < width, kept, gone)

    return elementwise(compiler, i, [kind, "u32"], kind, shifted)


@opcode("shf", "l r wrap clamp")
def _shf(compiler: Compiler, i: Instruction) -> Run:
    def funnel(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        by = by & np.uint32(31) if "wrap" in i.modifiers else np.minimum(by, np.uint32(32))
        value, by = (
            low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32),
            by.astype(np.uint64),
        )
        moved = (value << by) >> np.uint64(32) if "l" in i.modifiers else value >> by
        return moved.astype(np.uint32)

    return elementwise(compiler, i, ["b32"] * 3, "b32", funnel)


@opcode("lop3")
def _lop3(compiler: Compiler, i: Instruction) -> Run:
    table = int(i.operands[4], 0)
    short = Instruction(i.line, i.source, i.guard, i.negated, i.opcode, i.operands[:4])
    return elementwise(
        compiler, short, ["b32"] * 3, "b32", lambda a, b, c: arithmetic.looked_up(a, b, c, table)
    )


@opcode("prmt", "f4e b4e rc8 ecl ecr rc16")
def _prmt(compiler: Compiler, i: Instruction) -> Run:
    mode = "".join(i.modifiers)
    return elementwise(
        compiler, i, ["b32"] * 3, "b32", lambda a, b, c: arithmetic.permuted_bytes(a, b, c, mode)
    )


@opcode("bfe")
def _bfe(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    to = f"u{BITS[kind]}"
    return elementwise(
        compiler,
        i,
        [kind, "u32", "u32"],
        to,
        lambda x, p, n: arithmetic.bit_field(x, p, n, kind[0] == "s"),
    )


@opcode("bfi")
def _bfi(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    return elementwise(compiler, i, [kind, kind, "u32", "u32"], kind, arithmetic.insert_bits)


@opcode("popc clz bfind brev", "shiftamt")
def _count(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    width = BITS[kind]

    def bits(x: np.ndarray) -> np.ndarray:
        """Each bit, the lowest first."""
        return (np.asarray(x)[..., None] >> np.arange(width, dtype=x.dtype)) & x.dtype.type(1)

    def bfind(x: np.ndarray) -> np.ndarray:
        x = np.where(x < 0, ~x, x)
        highest = np.where(x != 0, width - 1 - np.argmax(bits(x)[..., ::-1], -1), -1)
        return np.where(
            (x != 0) & ("shiftamt" in i.modifiers), width - 1 - highest, highest
        ).astype(np.uint32)

    functions: dict[str, Callable[..., Any]] = {
        "popc": lambda x: bits(x).sum(-1).astype(np.uint32),
        "clz": lambda x: np.where(x != 0, np.argmax(bits(x)[..., ::-1], -1), width).astype(
            np.uint32
        ),
        "bfind": bfind,
        "brev": lambda x: (bits(x)[..., ::-1] << np.arange(width, dtype=x.dtype)).sum(
            -1, dtype=x.dtype
        ),
    }
    return elementwise(compiler, i, [kind], kind if i.base == "brev" else "u32", functions[i.base])


@opcode("mov")
def _mov(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    kind = kind if kind == "pred" else f"b{BITS[kind]}"
    if i.operands[0].startswith("{"):
        return _unpack(compiler, i, kind)
    if i.operands[1].startswith("{"):
        return _pack(compiler, i, kind)
    return elementwise(compiler, i, [kind], kind, lambda x: x)


def _unpack(compiler: Compiler, i: Instruction, kind: str) -> Run:
    names = compiler.vector(i.operands[0])
    width = BITS[kind] // len(names)
    puts, get = (
        [compiler.put(name, f"b{width}") for name in names],
        compiler.get(i.operands[1], kind),
    )

    def run(lanes: Lanes) -> None:
        value = get(lanes)
        pieces = [
            (value >> value.dtype.type(width * j)).astype(UINT[width]) for j in range(len(puts))
        ]
        for put, piece in zip(puts, pieces, strict=True):
            put(lanes, piece)

    return run


def _pack(compiler: Compiler, i: Instruction, kind: str) -> Run:
    names = compiler.vector(i.operands[1])
    width, whole = BITS[kind] // len(names), UINT[BITS[kind]]
    gets, put = (
        [compiler.get(name, f"b{width}") for name in names],
        compiler.put(i.operands[0], kind),
    )

    def run(lanes: Lanes) -> None:
        pieces = [get(lanes).astype(whole) << whole(width * j) for j, get in enumerate(gets)]
        result = pieces[0]
        for piece in pieces[1:]:
            result = result | piece
        put(lanes, result)

    return run


@opcode("cvta", "to global shared local const param shared__cta")
def _cvta(compiler: Compiler, i: Instruction) -> Run:
    kind = i.types[-1]
    if not i.one_of("shared", "shared__cta"):
        return elementwise(compiler, i, [kind], kind, lambda x: x)
    move = np.subtract if "to" in i.modifiers else np.add
    return elementwise(compiler, i, [kind], kind, lambda x: move(x, np.uint64(SHARED_WINDOW)))


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt", "rn rz rm rp rni rzi rmi rpi ftz sat relu")
def _cvt(compiler: Compiler, i: Instruction) -> Run:
    to, source = i.types[0], i.types[-1]
    if len(i.operands) == 3:  # cvt.rn.bf16x2.f32 d, upper, lower
        return _cvt_pair(compiler, i, to)
    if "relu" in i.modifiers:
        raise Fault("unknown opcode", i.opcode)
    function = _conversion(i, to, source)
    if to in HALVES:
        rounding, put = i.one_of("rn", "rz") or "rn", compiler.put(i.operands[0], f"b{BITS[to]}")
        get = compiler.get(i.operands[1], source)
        return lambda lanes: put(lanes, arithmetic.narrow(function(get(lanes)), to, rounding))
    return elementwise(compiler, i, [source], to, function)


def _cvt_pair(compiler: Compiler, i: Instruction, to: str) -> Run:
    rounding, relu = i.one_of("rn", "rz") or "rn", "relu" in i.modifiers

    def pair(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        both = np.stack(np.broadcast_arrays(lower, upper), -1)
        both = np.where(both < 0, np.float32(0), both) if relu else both
        return arithmetic.narrow(both, to, rounding)

    return elementwise(compiler, i, ["f32", "f32"], "b32", pair)


def _conversion(i: Instruction, to: str, source: str) -> Callable[..., Any]:
    if is_float(source) and is_float(to):
        return _finished(i, _between_floats(i, to))
    if is_float(source):
        whole = _TO_INTEGER[i.one_of(*_TO_INTEGER)]
        info = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{BITS[to] // 8}")

        def clamped(x: np.ndarray) -> np.ndarray:
            x = whole(
                (flush(np.asarray(x)) if "ftz" in i.modifiers else np.asarray(x)).astype(np.float64)
            )
            inside = np.where((x > float(info.min)) & (x < float(info.max)), x, 0.0).astype(
                info.dtype
            )
            return np.where(
                x >= float(info.max), info.max, np.where(x <= float(info.min), info.min, inside)
            )

        return lambda x: clamped(x).astype(info.dtype)
    if is_float(to):
        if i.one_of("rz", "rm", "rp"):
            raise Fault("unknown opcode", i.opcode)
        kind = np.float64 if to == "f64" else np.float32
        return lambda x: x.astype(kind)
    kind = np.dtype(f"{'i' if to[0] == 's' else 'u'}{BITS[to] // 8}")
    if "sat" in i.modifiers:
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        return lambda x: np.clip(
            x.astype(np.int64) if x.dtype != np.uint64 else x, low, high
        ).astype(kind)
    return lambda x: x.astype(kind)


def _between_floats(i: Instruction, to: str) -> Callable[..., Any]:
    whole, rounding = i.one_of(*_TO_INTEGER), i.one_of("rz", "rm", "rp")
    if whole:
        return lambda x: _TO_INTEGER[whole](x)
    kind = np.float64 if to == "f64" else np.float32
    if not rounding or to in HALVES or kind is np.float64:
        return lambda x: x.astype(kind)

    def directed(x: np.ndarray) -> np.ndarray:
        near = x.astype(np.float32)
        down = {"rm": near > x, "rp": np.zeros_like(near, bool), "rz": (near > x) & (x > 0)}[
            rounding
        ]
        up = {"rp": near < x, "rm": np.zeros_like(near, bool), "rz": (near < x) & (x < 0)}[rounding]
        near = np.where(down, np.nextafter(near, np.float32(-np.inf)), near)
        return np.where(up, np.nextafter(near, np.float32(np.inf)), near)

    return directed


@opcode("membar fence prefetch nanosleep griddepcontrol createpolicy", " ".join((
    "gl cta sys gpu acq_rel sc cluster global L1 L2 wait launch_dependents fractional",
    "L2__evict_first L2__evict_last L2__evict_normal L2__evict_unchanged",
)))  # fmt: skip
def _hint(compiler: Compiler, i: Instruction) -> Run:
    """Order of memory between blocks and wishes about caches are not modelled."""
    if i.base == "createpolicy":
        put = compiler.put(i.operands[0], "b64")
        return lambda lanes: put(lanes, np.uint64(0))
    return lambda lanes: None
