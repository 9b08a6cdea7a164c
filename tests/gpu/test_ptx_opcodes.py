"""The opcodes of the machine that runs PTX against Python's integers, fractions and what the
manual's tables say."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.ptx.arithmetic import fma, fma_odd, to_bf16
from support.ptx.bare import execute

A, B, C = (np.random.default_rng(seed).integers(0, 2**32, 64, np.uint32) for seed in range(3))
A[:4], B[:4] = [0, 1, 0x80000000, 0xFFFFFFFF], [0xFFFFFFFF, 31, 32, 0]
MASK = 0xFFFFFFFF
LOAD = "ld.global.u32 %r6, [%d4]; ld.global.u32 %r7, [%d4+256]; ld.global.u32 %r8, [%d4+512]; "


def results(instruction: str) -> list[int]:
    """What an instruction makes of %r6, %r7, %r8, which hold A, B, C, in %r9."""
    numbers = torch.from_numpy(np.concatenate([A, B, C]).view(np.int32).copy())
    execute(LOAD + instruction + "; st.global.u32 [%d4], %r9;", numbers, threads=64)
    return numbers[:64].numpy().view(np.uint32).tolist()


def signed(x: int) -> int:
    return x - 2**32 if x >> 31 else x


def reverse(x: int) -> int:
    return int(f"{x:032b}"[::-1], 2)


def prmt(pick: Callable[[int, int], int]) -> Callable[[int, int, int], int]:
    """Of the mode that takes byte `pick(selector, i)` for byte i."""

    def result(a: int, b: int, c: int) -> int:
        bytes_ = (a | b << 32).to_bytes(8, "little")
        return int.from_bytes(bytes(bytes_[pick(c & 3, i)] for i in range(4)), "little")

    return result


def bfe(a: int, position: int, length: int) -> int:
    return a >> position & ((1 << length) - 1)


INTEGER: dict[str, Callable[[int, int, int], int]] = {
    "mul.hi.u32 %r9, %r6, %r7": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r9, %r6, %r7": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul.lo.s32 %r9, %r6, %r7": lambda a, b, c: a * b,
    "mad.lo.u32 %r9, %r6, %r7, %r8": lambda a, b, c: a * b + c,
    "mad.hi.u32 %r9, %r6, %r7, %r8": lambda a, b, c: (a * b >> 32) + c,
    "mul.wide.u16 %r9, %h1, %h2": lambda a, b, c: (a & 0xFFFF) * (b & 0xFFFF),
    "div.s32 %r9, %r6, 7": lambda a, b, c: int(Fraction(signed(a), 7)),
    "rem.s32 %r9, %r6, 7": lambda a, b, c: int(math.fmod(signed(a), 7)),
    "shl.b32 %r9, %r6, %r7": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %r9, %r6, %r7": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 %r9, %r6, %r7": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r9, %r6, %r7, %r8": lambda a, b, c: (a | b << 32) << (c & 31) >> 32,
    "shf.r.clamp.b32 %r9, %r6, %r7, %r8": lambda a, b, c: (a | b << 32) >> min(c, 32),
    "lop3.b32 %r9, %r6, %r7, %r8, 0xca": lambda a, b, c: (a & b) | (~a & c),
    "lop3.b32 %r9, %r6, %r7, %r8, 0x96": lambda a, b, c: a ^ b ^ c,
    "prmt.b32 %r9, %r6, %r7, 0x6420": lambda a, b, c: prmt(lambda s, i: 2 * i)(a, b, c),
    "prmt.b32 %r9, %r6, %r7, 0x9880": lambda a, b, c: (
        a & 255 | 255 * (a >> 7 & 1) << 8 | 255 * (a >> 7 & 1) << 16 | 255 * (a >> 15 & 1) << 24
    ),
    "prmt.b32.f4e %r9, %r6, %r7, %r8": prmt(lambda s, i: s + i),
    "prmt.b32.b4e %r9, %r6, %r7, %r8": prmt(lambda s, i: s - i & 7),
    "prmt.b32.rc8 %r9, %r6, %r7, %r8": prmt(lambda s, i: s),
    "prmt.b32.ecl %r9, %r6, %r7, %r8": prmt(lambda s, i: max(s, i)),
    "prmt.b32.ecr %r9, %r6, %r7, %r8": prmt(lambda s, i: min(s, i)),
    "prmt.b32.rc16 %r9, %r6, %r7, %r8": prmt(lambda s, i: 2 * (s & 1) + (i & 1)),
    "bfe.u32 %r9, %r6, 5, 9": lambda a, b, c: bfe(a, 5, 9),
    "bfe.s32 %r9, %r6, 5, 9": lambda a, b, c: bfe(a, 5, 9) - (512 if a >> 13 & 1 else 0),
    "bfe.s32 %r9, %r6, 28, 9": lambda a, b, c: signed(a) >> 28,
    "bfi.b32 %r9, %r6, %r7, 5, 9": lambda a, b, c: b & ~(511 << 5) | (a & 511) << 5,
    "popc.b32 %r9, %r6": lambda a, b, c: a.bit_count(),
    "clz.b32 %r9, %r6": lambda a, b, c: 32 - a.bit_length(),
    "bfind.u32 %r9, %r6": lambda a, b, c: a.bit_length() - 1,
    "bfind.shiftamt.u32 %r9, %r6": lambda a, b, c: 32 - a.bit_length() if a else -1,
    "bfind.s32 %r9, %r6": lambda a, b, c: (~a & MASK if a >> 31 else a).bit_length() - 1,
    "brev.b32 %r9, %r6": lambda a, b, c: reverse(a),
    "cnot.b32 %r9, %r6": lambda a, b, c: int(a == 0),
    "cvt.u32.u16 %r9, %h1": lambda a, b, c: a & 0xFFFF,
    "cvt.s32.s16 %r9, %h1": lambda a, b, c: (a & 0x7FFF) - (a & 0x8000),
    "cvt.sat.s8.s32 %r9, %r6": lambda a, b, c: min(max(signed(a), -128), 127),
}  # fmt: skip


@pytest.mark.parametrize("instruction", INTEGER)
def test_integers(instruction: str) -> None:
    before = "cvt.u16.u32 %h1, %r6; cvt.u16.u32 %h2, %r7; "
    expected = [INTEGER[instruction](*map(int, each)) & MASK for each in zip(A, B, C, strict=True)]
    assert results(before + instruction) == expected


def floats(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(64) * 2.0 ** np.random.default_rng(
        seed + 9
    ).integers(-30, 30, 64)
    values[:3] = [np.inf, 0.0, 2.0**-130]
    return values.astype(np.float32)


X, Y, Z = (floats(seed) for seed in (1, 2, 3))


def in_direction(exact: Fraction, rounding: str) -> float:
    """A float32 for an exact number, found by stepping from the nearest one."""
    near = np.float32(float(exact))
    candidates = [
        np.nextafter(near, np.float32(-np.inf)),
        near,
        np.nextafter(near, np.float32(np.inf)),
    ]
    towards = {"rm": -1, "rp": 1, "rz": -1 if exact > 0 else 1}.get(rounding)
    if towards is None:
        return float(
            min(
                candidates,
                key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1),
            )
        )
    allowed = [x for x in candidates if (Fraction(float(x)) - exact) * towards >= 0]
    return float(min(allowed, key=lambda x: abs(Fraction(float(x)) - exact)))


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("opcode", ["fma", "add", "sub", "mul"])
def test_each_direction_of_rounding(opcode: str, rounding: str) -> None:
    third = ", %f3" if opcode == "fma" else ""
    numbers = torch.from_numpy(np.concatenate([X, Y, Z]))
    execute(
        f"ld.global.f32 %f1, [%d4]; ld.global.f32 %f2, [%d4+256]; ld.global.f32 %f3, [%d4+512];"
        f"{opcode}.{rounding}.f32 %f4, %f1, %f2{third}; st.global.f32 [%d4], %f4;",
        numbers,
        threads=64,
    )
    for ours, *values in list(zip(numbers[:64].tolist(), X, Y, Z, strict=True))[1:]:
        x, y, z = (Fraction(float(value)) for value in values)
        exact = {"fma": x * y + z, "add": x + y, "sub": x - y, "mul": x * y}[opcode]
        assert ours == in_direction(exact, rounding)


def test_fma_of_doubles_rounds_once() -> None:
    a, b, c = np.float64(1 + 2.0**-52), np.float64(1 - 2.0**-52), np.float64(-1.0)
    assert fma(a[None], b[None], c[None])[0] == -(2.0**-104)


def test_a_16_bit_fma_rounds_once() -> None:
    """1 + 2^-8 lies in the middle of two bf16; what is beyond float32's digits decides."""
    one, tiny = np.array([1.0], np.float32), np.array([2.0**-60], np.float32)
    odd = fma_odd(one, np.array([1 + 2.0**-8], np.float32), tiny)
    assert to_bf16(odd)[0] == 0x3F81 and to_bf16(np.array([1 + 2.0**-8], np.float32))[0] == 0x3F80


CONVERSIONS = {
    "cvt.rni.s32.f32 %r9, %f1": [2**31 - 1, 0, 2, -2, 0],
    "cvt.rzi.s32.f32 %r9, %f1": [2**31 - 1, 0, 1, -2, 0],
    "cvt.rmi.s32.f32 %r9, %f1": [2**31 - 1, 0, 1, -3, 0],
    "cvt.rpi.u32.f32 %r9, %f1": [2**32 - 1, 0, 2, 0, 1],
    "cvt.rn.bf16x2.f32 %r9, %f1, 0f3F800000": [
        0x7F803F80,
        0x7FFF3F80,
        0x3FC03F80,
        0xC0203F80,
        0x00003F80,
    ],
    "cvt.rn.relu.bf16x2.f32 %r9, 0f3F800000, %f1": [
        0x3F807F80,
        0x3F807FFF,
        0x3F803FC0,
        0x3F800000,
        0x3F800000,
    ],
    "cvt.rn.f16x2.f32 %r9, 0f00000000, %f1": [0x7C00, 0x7E00, 0x3E00, 0xC100, 0],
    "cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r9, %h1": [0x7F80, 0x7FFF, 0x3FC0, 0xC020, 0],
    "cvt.rz.bf16.f32 %h1, 0f3F80FFFF; cvt.u32.u16 %r9, %h1": [0x3F80] * 5,
    "cvt.sat.f32.f32 %f2, %f1; mov.b32 %r9, %f2": [0x3F800000, 0, 0x3F800000, 0, 0x00000001],
    "cvt.ftz.f32.f32 %f2, %f1; mov.b32 %r9, %f2": [
        0x7F800000,
        0x7FC00000,
        0x3FC00000,
        0xC0200000,
        0,
    ],
    "abs.f32 %f2, %f1; cvt.rzi.u32.f32 %r9, %f2": [2**32 - 1, 0, 1, 2, 0],
    "setp.leu.f32 %p1, %f1, 0f0; selp.u32 %r9, 5, 6, %p1": [6, 5, 6, 5, 6],
    "setp.gt.and.f32 %p1|%p2, %f1, 0f0, %p3; selp.u32 %r9, 5, 6, %p2": [6, 5, 6, 5, 6],
    "testp.finite.f32 %p1, %f1; selp.u32 %r9, 5, 6, %p1": [6, 6, 5, 5, 5],
    "max.NaN.f32 %f2, %f1, 0f0; cvt.rpi.u32.f32 %r9, %f2": [2**32 - 1, 0, 2, 0, 1],
    "max.f32 %f2, 0fBF800000, %f1; mov.b32 %r9, %f2": [
        0x7F800000,
        0xBF800000,
        0x3FC00000,
        0xBF800000,
        1,
    ],
    "copysign.f32 %f2, %f1, 0f40000000; mov.b32 %r9, %f2": [
        0x40000000,
        0x40000000,
        0x40000000,
        0xC0000000,
        0x40000000,
    ],
}


@pytest.mark.parametrize("instructions", CONVERSIONS)
def test_conversions_and_comparisons(instructions: str) -> None:
    """Of infinity, NaN, 1.5, -2.5 and the smallest number there is."""
    numbers = torch.tensor([torch.inf, torch.nan, 1.5, -2.5, 2.0**-149] + [0.0] * 27)
    before = "ld.global.f32 %f1, [%d4]; setp.eq.u32 %p3, 0, 0; "
    execute(before + instructions + "; st.global.u32 [%d4], %r9;", numbers)
    assert numbers[:5].numpy().view(np.uint32).tolist() == [
        x & MASK for x in CONVERSIONS[instructions]
    ]


def test_packed_16_bit_arithmetic() -> None:
    numbers = torch.tensor([1.5, -2.0] * 32, dtype=torch.bfloat16)
    body = (
        "ld.global.b32 %r6, [%d4]; add.rn.bf16x2 %r7, %r6, %r6; fma.rn.bf16x2 %r7, %r7, %r6, %r6;"
    )
    execute(body + "max.bf16x2 %r7, %r7, %r6; st.global.b32 [%d4], %r7;", numbers)
    assert numbers[:2].tolist() == [6.0, 6.0]


def test_doubles() -> None:
    out = torch.zeros(1, dtype=torch.float64)
    body = (
        "mov.f64 %e1, 0d3FF8000000000000; rcp.rn.f64 %e2, %e1; div.rn.f64 %e3, %e2, %e1; "
        "sqrt.rn.f64 %e3, %e3;"
    )
    execute(body + "fma.rn.f64 %e3, %e3, %e1, %e1; st.global.f64 [%d1], %e3;", out, threads=1)
    assert out.item() == 2.5


def of_warp(instruction: str, threads: int = 32) -> list[int]:
    out = torch.zeros(threads, dtype=torch.int32)
    execute(instruction + "; st.global.u32 [%d4], %r9;", out, threads=threads)
    return out.tolist()


def test_shuffles_within_segments() -> None:
    lanes = range(32)
    assert of_warp("shfl.sync.bfly.b32 %r9, %r1, 3, 31, -1") == [lane ^ 3 for lane in lanes]
    assert of_warp("shfl.sync.up.b32 %r9, %r1, 2, 0, -1") == [
        lane - 2 if lane >= 2 else lane for lane in lanes
    ]
    segments = 0x181F  # of eight lanes
    down = of_warp(f"shfl.sync.down.b32 %r9|%p1, %r1, 2, {segments}, -1")
    assert down == [lane + 2 if lane % 8 < 6 else lane for lane in lanes]
    index = of_warp(f"shfl.sync.idx.b32 %r9, %r1, 5, {segments}, -1")
    assert index == [lane // 8 * 8 + 5 for lane in lanes]
    valid = of_warp(f"shfl.sync.down.b32 %r6|%p1, %r1, 2, {segments}, -1; selp.u32 %r9, 1, 0, %p1")
    assert valid == [int(lane % 8 < 6) for lane in lanes]


def test_votes_and_matches() -> None:
    odd = "and.b32 %r6, %r1, 1; setp.eq.u32 %p1, %r6, 1;"
    assert of_warp(odd + "vote.sync.ballot.b32 %r9, %p1, -1") == [0xAAAAAAAA - 2**32] * 32
    assert of_warp(odd + "vote.sync.any.pred %p2, %p1, -1; selp.u32 %r9, 1, 0, %p2") == [1] * 32
    assert of_warp(odd + "vote.sync.all.pred %p2, %p1, -1; selp.u32 %r9, 1, 0, %p2") == [0] * 32
    expected = [(0xAAAAAAAA if lane % 2 else 0x55555555) for lane in range(32)]
    assert [x & MASK for x in of_warp(odd + "match.any.sync.b32 %r9, %r6, -1")] == expected
    some = "setp.lt.u32 %p1, %r1, 5; mov.u32 %r9, 0; @%p1 activemask.b32 %r9"
    assert of_warp(some) == [31] * 5 + [0] * 27


def test_reductions_of_a_warp() -> None:
    assert of_warp("redux.sync.add.u32 %r9, %r1, -1", 64) == [496] * 32 + [1520] * 32
    assert (
        of_warp("sub.s32 %r6, 9, %r1; redux.sync.min.s32 %r9, %r6, -1", 64)
        == [-22] * 32 + [-54] * 32
    )


def test_vectors_caches_and_parts_of_registers() -> None:
    numbers = torch.arange(128, dtype=torch.int32)
    body = "mul.wide.u32 %d5, %r1, 16; add.s64 %d5, %d1, %d5;"
    body += "ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r6, %r7, %r8, %r9}, [%d5];"
    body += (
        "mov.b64 %d6, {%r6, %r9}; mov.b64 {%r9, %r6}, %d6; st.global.cs.v4.b32 [%d5], {%r6, %r7, "
        "%r8, %r9};"
    )
    execute(body, numbers)
    expected = torch.arange(128).view(32, 4)[:, [3, 1, 2, 0]].reshape(-1)
    assert torch.equal(numbers.long(), expected)


def test_generic_addresses_are_of_shared_memory_or_of_global() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    body = (
        "st.shared.u32 [%r5], %r1; cvt.u64.u32 %d5, %r5; cvta.shared.u64 %d5, %d5; ld.u32 %r6, "
        "[%d5];"
    )
    execute(body + "add.s32 %r6, %r6, 7; st.u32 [%d4], %r6;", out, shared=128)
    assert out.tolist() == list(range(7, 39))


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_a_warp_to_shared_memory(transposed: bool) -> None:
    """Two of them, of 8 x 8 halves: lane 4 r + c has those of row r from column 2 c on."""
    numbers = torch.arange(128, dtype=torch.int16)
    out = numbers.view(torch.int32).clone()
    kind = "x2.trans.shared" if transposed else "x2.shared"
    body = (
        "ld.global.u32 %r6, [%d4]; add.s64 %d5, %d4, 128; ld.global.u32 %r7, [%d5]; "
        f"shl.b32 %r8, %r1, 4; and.b32 %r8, %r8, 255; "
        f"stmatrix.sync.aligned.m8n8.{kind}.b16 [%r8], {{%r6, %r7}}; bar.warp.sync -1; "
        "ld.shared.u32 %r6, [%r5]; ld.shared.u32 %r7, [%r5+128]; "
        "st.global.u32 [%d4], %r6; st.global.u32 [%d5], %r7;"
    )
    execute(body, out, shared=256)
    matrices = numbers.view(2, 8, 8)
    expected = matrices.transpose(1, 2) if transposed else matrices
    assert torch.equal(out.view(torch.int16).view(2, 8, 8), expected)
