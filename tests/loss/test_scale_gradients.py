"""`scale_gradients_`: its engines against float64; CUDA and Triton as PTX on the CPU, and their
machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ptx.engines import ENGINES, Engine, operator
from torch import Tensor

from fastft.loss.scale_gradients import SCALE, scale_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of CUDA's block: 32768 numbers of 32 bits and 65536 of 16; of Triton's program: 65536
SIZES = [0, 1, 7, 63, 4_099]
SCALES = [1 / 3, 65_536.0, 0.5, 0.0, -(2.0**-30), torch.nan, torch.inf]
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


def draw(sizes: list[int], dtype: torch.dtype, shift: int = 0) -> list[Tensor]:
    """Gradients that begin `shift` numbers behind 16 bytes, between numbers that nobody may
    touch."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(size + 16, generator=generator).to(dtype) for size in sizes]
    return [part[shift : shift + size] for part, size in zip(whole, sizes, strict=True)]


def around(gradient: Tensor) -> Tensor:
    """All of the memory that `gradient` is a part of."""
    return torch.as_strided(
        gradient, (gradient.untyped_storage().nbytes() // gradient.itemsize,), (1,), 0
    )


def check(function: Any, gradients: list[Tensor], scale: float) -> None:
    """Runs it: each product is the exact one rounded once, and nothing else has changed."""
    before = [around(gradient).clone() for gradient in gradients]
    # the product of two numbers in fp32, or of 16 bits and fp32, is exact in float64
    factor = torch.tensor(scale)
    expected = [
        (gradient.double() * factor.double()).float().to(gradient.dtype) for gradient in gradients
    ]
    function(gradients, factor)
    for gradient, old, product in zip(gradients, before, expected, strict=True):
        torch.testing.assert_close(gradient, product, rtol=0, atol=0, equal_nan=True)
        first, last = gradient.storage_offset(), gradient.storage_offset() + gradient.numel()
        now = around(gradient)
        assert torch.equal(now[:first], old[:first]) and torch.equal(now[last:], old[last:])


def awkward(dtype: torch.dtype) -> Tensor:
    """Numbers that are none, the largest, subnormal ones, and zeros of both signs; products
    overflow and underflow."""
    info = torch.finfo(dtype)
    none, small = [torch.inf, -torch.inf, torch.nan], info.smallest_normal / 2
    ends = [*none, info.max, info.min, info.tiny, small, 0.0, -0.0]
    return torch.tensor([*ends, *ends], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_on_a_cpu(dtype: torch.dtype, scale: float) -> None:
    check(scale_gradients, [*draw(SIZES, dtype, 3), awkward(dtype)], scale)


def test_float64_is_scaled_in_float64() -> None:
    gradient, scale = torch.randn(9, dtype=torch.float64), torch.tensor(1 / 3, dtype=torch.float64)
    expected = gradient * (1 / 3)
    scale_gradients([gradient], scale)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("engine", "scale"),
    [
        pytest.param(e, s, id=f"{e}-{s}")
        for e in ENGINES
        for s in SCALES
        if e.chip == 90 or s in (1 / 3, torch.inf)
    ],
)
def test_gpu_kernels_as_ptx_round_once(engine: Engine, scale: float, dtype: torch.dtype) -> None:
    with operator(engine, SCALE.name) as (function, launches):
        check(function, [*draw(SIZES, dtype), awkward(dtype)], scale)
    assert len(launches) == (1 if engine.name == "cuda" else 5)


@pytest.mark.parametrize("shift", [1, 7])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@engines
def test_gpu_kernels_as_ptx_off_16_bytes(engine: Engine, dtype: torch.dtype, shift: int) -> None:
    with operator(engine, SCALE.name) as (function, _):
        for size in (1, 2, 8, 9, 16, 4_099):
            check(function, draw([size], dtype, shift), 1 / 3)


@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@engines
def test_gpu_kernels_as_ptx_over_several_blocks(engine: Engine, dtype: str, shift: int) -> None:
    """Of whole ones, and of a last one that has but few numbers."""
    sizes = [2 * 65_536 + 4_096 + 3, 5, 65_536]
    with operator(engine, SCALE.name, order=1) as (function, _):
        check(function, draw(sizes, DTYPES[dtype], shift), 1 / 3)


@engines
def test_gpu_kernels_as_ptx_take_several_dtypes_in_one_call(engine: Engine) -> None:
    gradients = [draw([70], dtype, 1)[0] for dtype in DTYPES.values()]
    with operator(engine, SCALE.name) as (function, _):
        check(function, gradients, 1 / 3)


def test_as_many_gradients_as_there_are() -> None:
    """More than the parameters of a launch hold."""
    gradients = [draw([i % 5], torch.bfloat16)[0] for i in range(200)]
    with operator(Engine("cuda", 90), SCALE.name) as (function, launches):
        check(function, gradients, 1 / 3)
    assert len(launches) == 3


@engines
def test_the_end_of_a_gradient_past_two_to_the_31(engine: Engine) -> None:
    """The last block, over a gradient of which it alone touches a part."""
    gradient = torch.empty(2**31 + 100, dtype=torch.bfloat16)  # untouched pages cost nothing
    gradient[-100:] = torch.arange(100)
    with operator(engine, SCALE.name, only=lambda blocks: [blocks - 1]) as (function, _):
        function([gradient], torch.tensor(0.5))
    assert torch.equal(gradient[-100:], torch.arange(100).bfloat16() / 2)


@engines
def test_a_scale_of_one_moves_nothing(engine: Engine) -> None:
    gradients = draw([2 * 65_536, 5], torch.bfloat16)
    with operator(engine, SCALE.name) as (function, launches):
        check(function, gradients, 1.0)
    assert launches
    for launch in launches:
        assert launch.bytes_written == 0
        assert launch.bytes_read == 4 * launch.block * launch.grid[0]


def test_nobody_waits_and_a_graph_can_be_captured() -> None:
    from support.ptx import cuda_operators, missing

    if missing():
        pytest.skip(str(missing()))
    with cuda_operators(90) as gpu:
        gpu.capturing = True
        check(gpu.ops.scale_gradients_, draw([70, 9], torch.bfloat16), 0.5)
        assert not gpu.waits.total()


@pytest.mark.parametrize("wrong", ["strided", "float64", "integers", "scale"])
def test_the_cuda_launcher_checks_its_arguments(wrong: str) -> None:
    gradient = {
        "strided": torch.zeros(4, 4).T[:, :2],
        "float64": torch.zeros(3, dtype=torch.float64),
        "integers": torch.zeros(3, dtype=torch.int32),
        "scale": torch.zeros(3),
    }[wrong]
    scale = torch.ones(()).double() if wrong == "scale" else torch.ones(())
    with operator(Engine("cuda", 90), SCALE.name) as (function, launches):
        with pytest.raises(RuntimeError, match=r"scale_gradients_: (gradient 0|scale) must be"):
            function([gradient], scale)
    assert launches == []


def test_an_engine_that_does_not_suit_is_not_taken() -> None:
    assert SCALE.resolve("auto", torch.device("cpu"), torch.float32) == "eager"
    for impl in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=r"it computes cuda.* tensors, these are on cpu"):
            SCALE.resolve(impl, torch.device("cpu"))


@pytest.mark.parametrize("chip", [80, 90])
def test_cuda_accesses_are_16_bytes_wide(chip: int) -> None:
    from support.kernel_counts import _cuda_binaries
    from support.ptx import missing

    if missing():
        pytest.skip(str(missing()))
    (code,) = _cuda_binaries("scale_gradients", chip).values()
    assert (code.spills, code.stack, code.atomics) == (0, 0, 0) and code.registers <= 48
    assert code.loads[128] >= 12 and code.stores[128] >= 12 and code.stores[64] == 0


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        *((chip, torch.bfloat16) for chip in (75, 80, 90, 100, 120)),
        (90, torch.float32),
        (90, torch.float16),
    ],
)
def test_triton_kernels_have_no_spills_and_wide_accesses(chip: int, dtype: torch.dtype) -> None:
    """Of a gradient of any size; one kernel for all of them."""
    pytest.importorskip("triton")
    from support.triton_compiler import binary, compiled_for

    from fastft.loss.scale_gradients_triton import scale_gradients_

    with compiled_for(chip) as kernels:
        for size in (1, 4_096, 70_001):
            scale_gradients_(
                [torch.empty(size, dtype=dtype, device="meta")], torch.empty((), device="meta")
            )
    assert kernels[0] is kernels[1] is kernels[2]
    code = binary(kernels[0])
    assert (code.spills, code.stack, code.atomics) == (0, 0, 0) and code.registers <= 32
    assert code.loads[128] == code.stores[128] == dtype.itemsize // 2  # of a thread, in a tile


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_on_a_gpu(impl: str, scale: float) -> None:
    device = torch.device("cuda", 0)
    reason = SCALE.unavailable(impl, device)
    if reason is not None:
        pytest.skip(reason)
    gradients = [tensor for dtype in DTYPES.values() for tensor in draw([70_001, 5], dtype, 3)]
    there = [gradient.cuda() for gradient in gradients]
    SCALE.implementation(impl, device)(there, torch.tensor(scale, device=device))
    check(
        lambda given, factor: [g.copy_(t) for g, t in zip(given, there, strict=True)],
        gradients,
        scale,
    )
