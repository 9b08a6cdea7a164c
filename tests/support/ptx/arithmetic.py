"""The arithmetic of PTX that numpy lacks, over arrays: fused multiply-add, directed rounding,
16-bit formats.

Values of f16, bf16 and of pairs of them (x2) travel as float32, pairs with a second dimension of
two.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from support.ptx.compiled import compiled
from support.ptx.parser import UINT

ROUNDINGS = ("rn", "rz", "rm", "rp")
_SMALLEST_NORMAL = {np.float32: np.float32(2.0**-126), np.float64: np.float64(2.0**-1022)}


@functools.cache
def _fused(kind: type) -> Callable[..., None]:
    source = Path(__file__).with_name("fused.c")
    flags = ["-O3", "-frounding-math", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC"]
    folder = compiled("fused", [source], [["cc", *flags, str(source), "-o", "libfused.so", "-lm"]])
    function = getattr(
        ctypes.CDLL(str(folder / "libfused.so")), "fused_f32" if kind is np.float32 else "fused_f64"
    )
    function.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_long, ctypes.c_int]
    return function


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """a * b + c in float32 or float64, rounded once."""
    kind = np.result_type(a, b, c).type
    a, b, c = (np.ascontiguousarray(x, kind) for x in np.broadcast_arrays(a, b, c))
    out = np.empty_like(a)
    _fused(kind)(
        a.ctypes.data,
        b.ctypes.data,
        c.ctypes.data,
        out.ctypes.data,
        a.size,
        ROUNDINGS.index(rounding),
    )
    return out


def fma_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, its last bit set where digits are lost: rounded again, it is as if
    rounded once."""
    down, up = fma(a, b, c, "rm"), fma(a, b, c, "rp")
    exact = fma(a, b, c, "rz")
    lost = (down != up) & np.isfinite(exact)
    return np.where(lost, (exact.view(np.uint32) | np.uint32(1)).view(np.float32), exact)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zero of their sign (.ftz)."""
    kind = x.dtype.type
    return np.where(np.abs(x) < _SMALLEST_NORMAL[kind], np.copysign(kind(0), x), x)


def to_bf16(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """The bits of float32 rounded to bf16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half = (
        np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        if rounding == "rn"
        else np.uint32(0)
    )
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_f16(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """The bits of float32 rounded to f16."""
    rounded = np.asarray(x).astype(np.float16)
    if rounding == "rz":
        beyond = np.abs(rounded.astype(np.float32)) > np.abs(x)
        rounded = np.where(beyond, np.nextafter(rounded, np.float16(0)), rounded)
    return rounded.view(np.uint16)


def narrow(values: np.ndarray, kind: str, rounding: str = "rn") -> np.ndarray:
    """The raw bits of float32 `values` as f16, bf16, f16x2 or bf16x2."""
    halves = (to_bf16 if kind.startswith("bf16") else to_f16)(values, rounding)
    if not kind.endswith("x2"):
        return halves
    return halves[..., 0].astype(np.uint32) | halves[..., 1].astype(np.uint32) << np.uint32(16)


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """The float32 values of raw bits."""
    if kind.endswith("x2"):
        bits = np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)], -1).astype(np.uint16)
    if kind.startswith("bf16"):
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def permuted_bytes(
    low: np.ndarray, high: np.ndarray, selector: np.ndarray, mode: str = ""
) -> np.ndarray:
    """prmt: four of the eight bytes of two registers."""
    value = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.shape(value | selector), np.uint32)
    for byte in range(4):
        pick = _picked(selector, byte, mode)
        picked = (value >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(picked & np.uint64(128), np.uint64(255), np.uint64(0))
        picked = np.where(pick & np.uint64(8), sign, picked)
        result |= (picked << np.uint64(8 * byte)).astype(np.uint32)
    return result


def _picked(selector: np.ndarray, byte: int, mode: str) -> np.ndarray:
    """Which byte goes to place `byte`; 8 added: its sign alone."""
    selector = selector.astype(np.uint64)
    place = selector & np.uint64(3)
    if not mode:
        return (selector >> np.uint64(4 * byte)) & np.uint64(15)
    at = np.uint64(byte)
    return {
        "f4e": place + at,
        "b4e": (place - at) & np.uint64(7),
        "rc8": place,
        "ecl": np.maximum(place, at),
        "ecr": np.minimum(place, at),
        "rc16": (place & np.uint64(1)) * np.uint64(2) + (at & np.uint64(1)),
    }[mode]


def bit_field(
    value: np.ndarray, position: np.ndarray, length: np.ndarray, signed: bool
) -> np.ndarray:
    """bfe: `length` bits from `position` on, sign-extended if `signed`; zeros or the sign beyond
    the register."""
    width = value.dtype.itemsize * 8
    position, length = position & np.uint32(255), length & np.uint32(255)
    wide = value.view(UINT[width]).astype(np.uint64)
    mask = _ones(length)
    field = (
        np.where(position < 64, wide >> np.minimum(position, 63).astype(np.uint64), 0).astype(
            np.uint64
        )
        & mask
    )
    if signed:
        last = np.minimum(position + length - np.uint32(1), width - 1).astype(np.uint64)
        negative = (length > 0) & ((wide >> last) & np.uint64(1) == 1)
        inside = _ones(np.minimum(length, np.maximum(width - position.astype(np.int64), 0)))
        field = np.where(negative, field | ~inside, field)
    return field.astype(UINT[width])


def insert_bits(
    field: np.ndarray, into: np.ndarray, position: np.ndarray, length: np.ndarray
) -> np.ndarray:
    """bfi: the low `length` bits of `field` laid over `into` from `position` on."""
    kind = into.dtype.type
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = np.where(
        position < 64, _ones(length) << np.minimum(position, 63).astype(np.uint64), np.uint64(0)
    )
    moved = np.where(
        position < 64, field.astype(np.uint64) << np.minimum(position, 63).astype(np.uint64), 0
    )
    return ((into.astype(np.uint64) & ~mask) | (moved.astype(np.uint64) & mask)).astype(kind)


def _ones(length: np.ndarray) -> np.ndarray:
    short = np.minimum(length, 63).astype(np.uint64)
    return np.where(
        np.asarray(length) >= 64,
        np.uint64(0xFFFFFFFFFFFFFFFF),
        (np.uint64(1) << short) - np.uint64(1),
    )


def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """lop3: the bit that `table` has for each three bits."""
    result = np.zeros_like(a | b | c)
    for row in (row for row in range(8) if table >> row & 1):
        result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of 16-, 32- or 64-bit integers."""
    bits, signed = 8 * a.dtype.itemsize, a.dtype.kind == "i"
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{bits // 4}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(a.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x1, x0, y1, y0 = x >> half, x & low, y >> half, y & low
    middle = x1 * y0 + (x0 * y0 >> half)
    result = x1 * y1 + (middle >> half) + ((middle & low) + x0 * y1 >> half)
    if signed:
        result = result - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return result.astype(a.dtype)
