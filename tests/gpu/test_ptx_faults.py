"""Planted faults: each check of the machine that runs PTX finds the fault it is for, and says where
it is."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ptx
from support.adamw_modes import MODES
from support.adamw_problems import Training
from support.ptx.bare import HEAD, execute
from support.ptx.checks import noise
from support.ptx.engines import Engine, adamw_by, unbound
from support.ptx.parser import Module, UnreadablePtx
from support.row_problems import CASES, draw, run
from support.segment_problems import draw as draw_segments
from support.segment_problems import run as run_segments
from torch import Tensor

from fastft import _native

needs_nvcc = pytest.mark.skipif(
    ptx.missing() is not None, reason=f"the CUDA kernels: {ptx.missing()}"
)
PLANTED = Path(ptx.__file__).with_name("planted.cu")


def ints(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def caught(kind: str, opcode: str, body: str, *tensors: Tensor, **options: Any) -> ptx.Fault:
    with pytest.raises(ptx.Fault) as caught:
        execute(body, *tensors, **options)
    fault = caught.value
    assert (fault.kind, fault.kernel, fault.instruction.opcode) == (kind, "planted", opcode), str(
        fault
    )
    assert f"line {fault.instruction.line}" in str(fault)
    return fault


def test_a_sound_kernel() -> None:
    out = ints(32)
    launch = execute("st.global.u32 [%d4], %r1;", out)
    assert out.tolist() == list(range(32))
    assert (
        launch.bytes_written == 128
        and launch.bytes_read == 0
        and launch.opcodes["st.global.u32"] == 32
    )


@pytest.mark.parametrize("elements", [31, 0])
def test_a_store_past_the_end(elements: int) -> None:
    whole = ints(32)
    caught("out of bounds", "st.global.u32", "st.global.u32 [%d4], %r1;", whole[:elements])
    assert not whole[elements:].any()


def test_a_load_before_the_begin() -> None:
    caught("out of bounds", "ld.global.u32", "ld.global.u32 %r6, [%d4+-4];", ints(33)[1:])


def test_a_store_between_the_rows_of_a_matrix() -> None:
    caught(
        "out of bounds", "st.global.u32", "st.global.u32 [%d4], %r1;", ints(64).view(2, 32)[:, :31]
    )


def test_a_store_to_the_parameters() -> None:
    body = "mov.u64 %d5, a; st.global.u32 [%d5], %r1;"
    caught("out of bounds", "st.global.u32", body, ints(1), threads=1)


def test_a_vector_off_its_alignment() -> None:
    body = "ld.global.v2.u32 {%r6, %r7}, [%d4];"
    caught("misaligned", "ld.global.v2.u32", body, ints(64))


@pytest.mark.parametrize("shared", [127, 0])
def test_shared_memory_that_the_launch_has_not_asked_for(shared: int) -> None:
    caught("out of bounds", "st.shared.u32", "st.shared.u32 [%r5], %r1;", shared=shared)


def test_a_register_that_nobody_wrote() -> None:
    caught("unwritten", "st.global.u32", "st.global.u32 [%d4], %r6;", ints(32))
    caught("unwritten", "st.global.u32", "@%p1 st.global.u32 [%d4], %r1;", ints(32))


def test_a_register_that_some_threads_wrote() -> None:
    some = "setp.lt.u32 %p1, %r1, 7; @%p1 mov.u32 %r6, 5;"
    caught(
        "unwritten",
        "st.global.u32",
        some + "add.s32 %r7, %r6, 1; st.global.u32 [%d4], %r7;",
        ints(32),
    )
    execute(some + "add.s32 %r7, %r6, 1; @%p1 st.global.u32 [%d4], %r7;", ints(32))


def test_what_a_shuffle_brings_from_a_lane_that_has_nothing() -> None:
    some = "setp.lt.u32 %p1, %r1, 4; @%p1 mov.u32 %r6, 5; shfl.sync.bfly.b32 %r7, %r6, 2, 31, -1;"
    execute(some + "@%p1 st.global.u32 [%d4], %r7;", ints(32))
    some = some.replace("%r6, 2,", "%r6, 4,")
    caught("unwritten", "st.global.u32", some + "@%p1 st.global.u32 [%d4], %r7;", ints(32))


def test_shared_memory_that_nobody_wrote() -> None:
    body = (
        "setp.lt.u32 %p1, %r1, 31; @%p1 st.shared.u32 [%r5], %r1; bar.sync 0; ld.shared.u32 %r6, "
        "[%r5];"
    )
    caught("unwritten", "ld.shared.u32", body, shared=128)


@needs_nvcc
def test_device_memory_that_nobody_wrote() -> None:
    """As torch.empty gives it: the second kernel reads what the first one has left out."""
    with ptx.cuda_operators(90) as gpu:
        gpu.edit("scan_kernel", lambda text: re.sub(r"st\.global\.u32\s[^;]*;", "", text, count=1))
        lengths, ignored, source = draw_segments([2, 3])
        outputs = [source.clone(), source.clone(), source.int(), gpu.fresh(ints(3))]
        with pytest.raises(ptx.Fault, match="reads byte 0 of fresh memory") as caught:
            gpu.ops.packed_boundaries(lengths, ignored, source, 0, *outputs)
    assert caught.value.kind == "unwritten" and caught.value.kernel == "fill_kernel"
    assert caught.value.instruction.source.startswith("boundaries.cu:")


SWAP = (
    "st.shared.u32 [%r5], %r1; {} xor.b32 %r6, %r3, {}; add.s32 %r6, %r4, %r6; ld.shared.u32 %r7, "
    "[%r6];"
)


@pytest.mark.parametrize("instead", ["", "bar.warp.sync -1;"])
def test_a_missing_barrier_of_the_block(instead: str) -> None:
    fault = caught(
        "shared race", "ld.shared.u32", SWAP.format(instead, 128), threads=64, shared=256
    )
    assert "st.shared.u32" in fault.detail
    execute(SWAP.format("bar.sync 0;", 128), threads=64, shared=256)


def test_a_missing_barrier_of_the_warp() -> None:
    caught("shared race", "ld.shared.u32", SWAP.format("", 4), shared=128)
    for instead in ("bar.warp.sync -1;", "shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;", "bar.sync 0;"):
        execute(SWAP.format(instead, 4), shared=128)


def test_a_write_before_others_have_read() -> None:
    body = SWAP.format("bar.sync 0;", 128) + "{} st.shared.u32 [%r5], 7;"
    caught("shared race", "st.shared.u32", body.format(""), threads=64, shared=256)
    execute(body.format("bar.sync 0;"), threads=64, shared=256)


def test_two_values_for_one_place() -> None:
    caught("shared race", "st.shared.u32", "st.shared.u32 [%r4], %r1;", shared=128)
    caught("global race", "st.global.u32", "st.global.u32 [%d1], %r1;", ints(1))
    execute("st.shared.u32 [%r4], 5;", shared=128)


def test_a_race_in_global_memory_within_a_block() -> None:
    body = (
        "st.global.u32 [%d4], %r1; {} xor.b32 %r6, %r3, 128; cvt.u64.u32 %d5, %r6; add.s64 %d5, "
        "%d1, %d5;"
    )
    body += "ld.global.u32 %r7, [%d5];"
    caught("global race", "ld.global.u32", body.format(""), ints(64), threads=64)
    execute(body.format("bar.sync 0;"), ints(64), threads=64)


@pytest.mark.parametrize(
    "second", ["st.global.u32 [%d4], %r2;", "ld.global.u32 %r7, [%d4];"], ids=["write", "read"]
)
def test_a_race_between_blocks(second: str) -> None:
    body = f"setp.eq.u32 %p1, %r2, 0; @%p1 st.global.u32 [%d4], %r1; bar.sync 0; @!%p1 {second}"
    caught("global race between blocks", second.split()[0], body, ints(32), blocks=2)


@pytest.mark.parametrize("order", [None, 1, 2, 3, 4])
def test_no_order_of_blocks_hides_a_race(order: int | None) -> None:
    body = "setp.eq.u32 %p1, %r2, 700; @%p1 st.global.u32 [%d4], %r1; ld.global.u32 %r7, [%d4];"
    with pytest.raises(ptx.Fault, match="race between blocks"):
        execute(body, ints(32), blocks=900, order=order)


def test_checks_of_races_can_be_left_out() -> None:
    execute(SWAP.format("", 128), threads=64, shared=256, checks=False)


@needs_nvcc
@pytest.mark.parametrize(
    "kernel", ["scan_kernel", "squares_kernel", "total_kernel", "rows_kernel<__nv_bfloat16, false>"]
)
def test_every_barrier_of_a_cuda_kernel_is_needed(kernel: str) -> None:
    def call(gpu: ptx.Gpu) -> None:
        if kernel == "scan_kernel":
            run_segments(gpu.ops.packed_boundaries, *draw_segments([3] * 70))
        elif kernel.startswith("rows_kernel"):
            run(gpu.ops.cross_entropy_rows, draw(CASES["in place"], 2, 2_051, torch.bfloat16))
        else:
            gpu.ops.grad_norm_squared_(
                torch.zeros((), dtype=torch.float64), [torch.randn(40_001), *torch.randn(300, 3)]
            )

    with ptx.cuda_operators(90) as gpu:
        call(gpu)
        barriers = count_barriers(gpu, kernel)
        assert barriers
        for number in range(barriers):
            gpu.edit(
                kernel,
                lambda text, number=number: without(text, number, r"bar\.(warp\.)?sync[^;]*;"),
            )
            with pytest.raises(ptx.Fault, match="race") as caught:
                call(gpu)
            assert caught.value.kernel == kernel, str(caught.value)


def count_barriers(gpu: ptx.Gpu, kernel: str) -> int:
    counted: list[int] = []

    def count(text: str) -> str:
        counted.append(len(re.findall(r"bar\.(?:warp\.)?sync", text)))
        return text + "\n"

    gpu.edit(kernel, count)
    return counted[0]


def without(text: str, number: int, pattern: str) -> str:
    """The text without the match `number` of a pattern."""
    match = list(re.finditer(pattern, text))[number]
    return text[: match.start()] + text[match.end() :]


@needs_nvcc
def test_blocks_that_take_one_another_s_part() -> None:
    with ptx.cuda_operators(90) as gpu:
        gpu.edit(
            "fill_kernel",
            lambda text: re.sub(r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;", text),
        )
        with pytest.raises(ptx.Fault) as caught:
            run_segments(gpu.ops.packed_boundaries, *draw_segments([400, 300]))
    assert (
        caught.value.kind == "global race between blocks" and caught.value.kernel == "fill_kernel"
    )


@pytest.mark.skipif(_native.missing("cpu") is not None, reason="no native CPU library")
@pytest.mark.parametrize("mode", ["exact-8bit", "exact-4bit"])
def test_the_barriers_of_a_triton_kernel_are_needed(mode: str) -> None:
    """`update_coded_tile` reads the scales of a block before it writes them."""
    pytest.importorskip("triton")

    def step(change: Callable[[str], str]) -> None:
        training = Training(MODES[mode], "cpp", sizes=(4, 4096)).step()
        with adamw_by(Engine("triton", 90), edit=change) as launches:
            unbound(training).step()
        assert launches

    step(lambda text: text)
    with pytest.raises(ptx.Fault, match="race") as caught:
        step(lambda text: re.sub(r"bar\.sync[^;]*;", "", text))
    assert caught.value.kernel == "_adamw_kernel" and "_triton.py:" in str(caught.value)


def test_a_barrier_that_only_some_threads_reach() -> None:
    body = (
        "setp.lt.u32 %p1, %r1, 7; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B: mov.u32 %r6, 0;"
    )
    assert "bar.sync 0 and " in caught("divergent barrier", "bar.sync", body).detail
    execute("setp.lt.u32 %p1, %r1, 7; @%p1 bra A; mov.u32 %r6, 1; A: bar.sync 0;")


def test_a_barrier_of_a_warp_that_some_lanes_miss() -> None:
    body = "setp.lt.u32 %p1, %r1, 7; @%p1 bra A; bar.warp.sync -1; A: mov.u32 %r6, 0;"
    caught("divergent barrier", "bar.warp.sync", body)


def test_a_shuffle_that_some_lanes_miss() -> None:
    body = (
        "setp.lt.u32 %p1, %r1, 7; @%p1 bra A; shfl.sync.bfly.b32 %r6, %r1, 1, 31, {}; A: mov.u32 "
        "%r6, 0;"
    )
    caught("divergent shuffle", "shfl.sync.bfly.b32", body.format("-1"))
    body = (
        "setp.lt.u32 %p1, %r1, 16; @%p1 bra A; shfl.sync.bfly.b32 %r6, %r1, {}, 31, 0xffff0000; A: "
        "mov.u32 %r6, 0;"
    )
    execute(body.format(1))
    caught("divergent shuffle", "shfl.sync.bfly.b32", body.format(16))


@needs_nvcc
def test_a_shuffle_of_a_cuda_kernel_that_some_lanes_miss() -> None:
    def without_thread_5(text: str) -> str:
        planted = (
            "{ .reg .b32 %lane; .reg .pred %planted; mov.u32 %lane, %tid.x; setp.eq.s32 %planted, "
            "%lane, 5;"
        )
        return text.replace("{", planted, 1).replace("shfl.sync", "@!%planted shfl.sync")

    with ptx.cuda_operators(90) as gpu:
        gpu.edit("rows_kernel<float, false>", without_thread_5)
        with pytest.raises(ptx.Fault) as caught:
            run(gpu.ops.cross_entropy_rows, draw(CASES["plain"], 2, 63, torch.float32))
    assert (
        caught.value.kind == "divergent shuffle"
        and caught.value.kernel == "rows_kernel<float, false>"
    )
    assert caught.value.instruction.opcode.startswith("shfl.sync")


@pytest.mark.parametrize(
    "instruction",
    ["wgmma.fence.sync.aligned", "add.rz.f32.v2 %f1, %f2, %f3", "shl.clamp.b32 %r6, %r1, 1"],
)
def test_an_opcode_that_the_machine_does_not_know(instruction: str) -> None:
    caught(
        "unknown opcode",
        instruction.split()[0],
        f"mov.f32 %f2, 0f3F800000; mov.f32 %f3, 0f0; {instruction};",
    )


def test_a_directive_that_the_machine_does_not_know() -> None:
    with pytest.raises(UnreadablePtx, match="local"):
        list(Module(HEAD + ".local .align 4 .b8 depot[8];\nret;\n}").values())


def test_a_loop_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.ptx.executor._MOST_STEPS", 1000)
    caught("endless", "add.s32", "A: add.s32 %r1, %r1, 1; bra A;")


def test_division_of_integers_by_zero() -> None:
    caught("division by zero", "div.u32", "div.u32 %r6, 32, %r1;")


def test_a_trap() -> None:
    caught("trap", "trap", "trap;")


def test_noise_is_a_function_of_the_input_s_bits() -> None:
    bits = np.arange(10_000, dtype=np.uint32) + np.float32(1.5).view(np.uint32)
    errors = noise(bits, 2)
    assert np.array_equal(errors, noise(bits, 2)) and set(errors.tolist()) == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(
    "opcode", ["ex2.approx.ftz.f32", "rcp.approx.ftz.f32", "div.full.f32", "sqrt.rn.f32"]
)
def test_noise_moves_approximations_alone(opcode: str) -> None:
    second = "%f1, 0f40400000" if opcode.startswith("div") else "%f1"
    body = f"ld.global.f32 %f1, [%d4]; {opcode} %f2, {second}; st.global.f32 [%d4], %f2;"
    results = []
    for ulp in (0, 2, 2):
        x = torch.linspace(1.1, 3.9, 256)
        execute(body, x, threads=256, noise_ulp=ulp)
        results.append(x.view(torch.int32))
    off = (results[1] - results[0]).abs()
    assert torch.equal(results[1], results[2]) and off.max() == (0 if ".rn." in opcode else 2)


def planted(gpu: ptx.Gpu, **changes: Any) -> int:
    call = {
        "barrier": 1,
        "threads": 64,
        "shared": 1024,
        "allowed": 0,
        "device": 0,
        "of_stream": 0,
    } | changes
    out = gpu.place(gpu.fresh(ints(call["threads"])), call.pop("of_memory", call["device"]))
    gpu.fault = None
    error = gpu.library.planted_launch(pointer(out), *call.values())
    if gpu.fault:
        raise gpu.fault
    assert error or out.tolist() == list(range(len(out)))[::-1]
    return error


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@needs_nvcc
@pytest.mark.parametrize("chip", [80, 90])
def test_a_launch_that_the_runtime_refuses(chip: int) -> None:
    invalid_value, invalid_configuration, invalid_handle = 1, 9, 400
    most = {80: 166_912, 90: 232_448}[chip]
    with ptx.cuda_operators(chip, sources=[PLANTED]) as gpu:
        assert planted(gpu) == 0
        assert planted(gpu, shared=49_153) == invalid_value
        assert planted(gpu, shared=most, allowed=most) == 0
        assert planted(gpu, shared=most, allowed=most + 1) == invalid_value
        assert planted(gpu, shared=most, device=1) == invalid_handle  # the stream is device 0's
        # each device has its own limit
        assert planted(gpu, shared=most, device=1, of_stream=1) == invalid_value
        assert planted(gpu, device=1, of_stream=1) == 0
        assert planted(gpu, threads=2048) == invalid_configuration
        with pytest.raises(ptx.Fault, match="launch refused"):
            planted(gpu, threads=512, shared=2048)  # more than __launch_bounds__ allows


@needs_nvcc
def test_memory_of_another_device_and_of_the_host() -> None:
    with ptx.cuda_operators(90, sources=[PLANTED]) as gpu:
        for elsewhere, words in ((1, "device 1"), (ptx.HOST, "the host")):
            with pytest.raises(ptx.Fault, match=f"another device: .* of {words}") as caught:
                planted(gpu, of_memory=elsewhere)
            assert caught.value.instruction.opcode.startswith("st.global")


@needs_nvcc
def test_a_missing_barrier_of_a_cu_file() -> None:
    with ptx.cuda_operators(90, sources=[PLANTED]) as gpu:
        with pytest.raises(ptx.Fault, match="shared race") as caught:
            planted(gpu, barrier=0)
    assert (
        caught.value.kernel == "reverse_kernel"
        and caught.value.instruction.source == "planted.cu:12"
    )


@needs_nvcc
def test_waits_are_counted_and_streams_handed_through() -> None:
    with ptx.cuda_operators(90, sources=[PLANTED]) as gpu:
        gpu.use_stream(7)
        gpu.use_stream(3, device=1)
        planted(gpu)
        planted(gpu, device=1, of_stream=1)
        assert [(launch.device, launch.stream) for launch in gpu.launches] == [(0, 7), (1, 3)]
        assert not gpu.waits
        gpu.library.planted_waits(pointer(ints(1)))
        assert gpu.waits == {"cudaMemcpy": 1, "cudaStreamSynchronize": 2}
