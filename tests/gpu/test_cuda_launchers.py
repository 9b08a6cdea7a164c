"""What the CUDA library's launchers do around their kernels: tables, streams, capture, limits,
sums; run as PTX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import ptx, segment_problems
from support.adamw_modes import MODES
from support.adamw_problems import Training, past_two_to_the_31
from support.adamw_steps import assert_same_bits
from support.ptx.cuda import OPERATORS, tensors_in
from support.ptx.engines import cuda_for_cpp
from support.row_problems import CASES, check, draw
from torch import Tensor

pytestmark = pytest.mark.skipif(
    ptx.missing() is not None, reason=f"the CUDA kernels: {ptx.missing()}"
)


def kernels(gpu: ptx.Gpu, begin: int = 0) -> list[str]:
    return [launch.kernel for launch in gpu.launches[begin:]]


def update(adamw_: Callable[..., None]) -> None:
    ours, theirs = (past_two_to_the_31("8bit").end for _ in range(2))
    adamw_(*ours)
    torch.ops.fastft.adamw_(*theirs)
    assert_same_bits(list(tensors_in(ours)), list(tensors_in(theirs)))


def add_up(grad_norm_squared_: Callable[..., None]) -> None:
    total, grads = torch.zeros((), dtype=torch.float64), [torch.randn(507), torch.randn(40_000)]
    grad_norm_squared_(total, grads)
    assert total.item() == pytest.approx(
        sum(grad.double().square().sum().item() for grad in grads), rel=1e-10
    )


def sum_chunks(grad_square_sums_: Callable[..., None]) -> None:
    grads = [torch.randn(40_000), torch.randn(507).bfloat16()]
    chunks = [chunk for grad in grads for chunk in grad.split(16_384)]
    sums = torch.full((4,), torch.nan, dtype=torch.float64)
    grad_square_sums_(sums, grads)
    expected = [chunk.double().square().sum().item() for chunk in chunks]
    assert sums.tolist() == pytest.approx(expected, rel=1e-10)


def total_sums(grad_norm_total_: Callable[..., None]) -> None:
    total, sums = torch.zeros((), dtype=torch.float64), torch.rand(2_051, dtype=torch.float64)
    grad_norm_total_(total, sums)
    assert total.item() == pytest.approx(sums.sum().item(), rel=1e-12)


def scale(scale_gradients_: Callable[..., None]) -> None:
    gradients = [torch.randn(40_003), torch.randn(63).bfloat16()]
    expected = [gradient / 4 for gradient in gradients]
    scale_gradients_(gradients, torch.tensor(0.25))
    assert_same_bits(gradients, expected)


# a call of each operator; AdamW's bound steps run the code of adamw_
USES = {
    "cross_entropy_rows": lambda rows: check(
        rows, draw(CASES["everything"], 2, 40_003, torch.bfloat16)
    ),
    "packed_boundaries": lambda fill: segment_problems.check(fill, [3, 700], 0, False),
    "grad_norm_squared_": add_up,
    "grad_square_sums_": sum_chunks,
    "grad_norm_total_": total_sums,
    "adamw_": update,
    "scale_gradients_": scale,
}


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("name", sorted({*OPERATORS} - {"adamw_bind", "adamw_bound_"}))
def test_all_launches_are_on_the_tensors_device_and_its_stream(name: str, device: int) -> None:
    """Whichever device is the current one."""
    with ptx.cuda_operators(90) as gpu:
        gpu.use_stream(5)
        gpu.use_stream(7, device=1)

        def there(*arguments: Any) -> None:
            for tensor in tensors_in(arguments):
                gpu.place(tensor, device)
            getattr(gpu.ops, name)(*arguments)

        USES[name](there)
        assert {(launch.device, launch.stream) for launch in gpu.launches} == {
            (device, (5, 7)[device])
        }
        assert gpu.held == 0 and not gpu.waits


# a warp looks at 32 places at once: around one and two rounds of that
@pytest.mark.parametrize(
    "tensors", [1, 2, 31, 32, 33, 65, pytest.param(1025, marks=pytest.mark.ptx)]
)
def test_every_tensor_is_found(tensors: int) -> None:
    sizes = (4097, *[3, 0, 1][: tensors - 1], *[2] * (tensors - 4))
    expected = Training(MODES["exact-fp32"], "cpp", sizes=sizes).step(1).values()
    with ptx.cuda_operators(90) as gpu, cuda_for_cpp(gpu):
        assert_same_bits(
            Training(MODES["exact-fp32"], "cpp", sizes=sizes).step(1).values(), expected
        )


@pytest.mark.parametrize(
    ("mode", "kernel"),
    [("fp32-fp32", 0), ("exact-fp32", 1), ("nearest-fp32", 4), ("exact-bf16", 5), ("fp32-8bit", 6)],
)
def test_tensors_that_are_kept_alike_have_a_kernel_of_their_own(mode: str, kernel: int) -> None:
    with ptx.cuda_operators(90) as gpu, cuda_for_cpp(gpu):
        Training(MODES[mode], "cpp", sizes=(4, 4)).step()
    assert kernels(gpu)[-1] == f"adamw_kernel<{kernel}>"


def test_a_step_on_another_stream_has_a_table_there() -> None:
    expected = Training(MODES["exact-fp32"], "cpp").step(3).values()
    with ptx.cuda_operators(90) as gpu, cuda_for_cpp(gpu):
        training = Training(MODES["exact-fp32"], "cpp").step()
        first = kernels(gpu)
        gpu.use_stream(1)
        training.step()
        # the whole table again, and not only the gradients' places
        assert kernels(gpu, len(first)) == first
        assert {launch.stream for launch in gpu.launches[len(first) :]} == {1}
        again = len(gpu.launches)
        assert_same_bits(training.step().values(), expected)
        assert len(gpu.launches) - again < len(first)


def test_a_captured_step_on_another_stream_keeps_the_table() -> None:
    """Such a stream belongs to the capture; what is uploaded there would be uploaded at every
    replay."""
    with ptx.cuda_operators(90) as gpu, cuda_for_cpp(gpu):
        training = Training(MODES["exact-fp32"], "cpp", capturable=True).step()
        first = len(gpu.launches)
        gpu.use_stream(1)
        gpu.capturing = True
        training.step()
        assert kernels(gpu, first) == ["upload_kernel", "adamw_kernel<1>"]


@pytest.mark.parametrize("captured", [False, True])
def test_a_table_that_a_graph_reads_is_written_at_each_step_and_never_given_back(
    captured: bool,
) -> None:
    """A replay, which nobody sees here, writes the gradients' places of its capture."""
    with ptx.cuda_operators(90) as gpu, cuda_for_cpp(gpu):
        training = Training(MODES["exact-fp32"], "cpp", capturable=True).step()
        gpu.capturing = captured
        training.optimizer.step()
        gpu.capturing = False
        before = len(gpu.launches)
        training.optimizer.step()
        assert kernels(gpu, before) == ["upload_kernel"] * captured + ["adamw_kernel<1>"]
        assert gpu.held == 1
        for part in training.optimizer._plan.parts:
            gpu.release(part.binding._number)
        assert gpu.held == captured


def test_a_stream_that_cannot_be_asked_is_a_sentence_and_no_failed_launch() -> None:
    with ptx.cuda_operators(90) as gpu, cuda_for_cpp(gpu):
        training = Training(MODES["fp32-fp32"], "cpp").step()
        gpu.library.fake_capturing(-1)
        launches = len(gpu.launches)
        with pytest.raises(RuntimeError, match="cannot tell whether the stream is captured"):
            training.step()
        assert len(gpu.launches) == launches
        gpu.library.fake_capturing(0)
        training.step()


def total(gpu: ptx.Gpu, grads: list[Tensor]) -> float:
    result = torch.full((), torch.nan, dtype=torch.float64)
    gpu.ops.grad_norm_squared_(result, grads)
    return result.item()


def test_the_total_of_chunk_sums_has_the_bits_of_the_norm_at_once() -> None:
    grads = [torch.randn(size) for size in (1, 16_384, 16_385, 507, 0, *[63] * 400)]
    grads[2] = grads[2].bfloat16()
    with ptx.cuda_operators(90) as gpu:
        at_once = total(gpu, grads)
        parts = [torch.empty(-(-grad.numel() // 16_384), dtype=torch.float64) for grad in grads]
        for part, grad in zip(parts, grads, strict=True):
            gpu.ops.grad_square_sums_(part, [grad])
        result = torch.empty((), dtype=torch.float64)
        gpu.ops.grad_norm_total_(result, torch.cat(parts))
    assert result.item() == at_once


# squares below and above the range of float32, and at its ends
@pytest.mark.parametrize("scale", [1.0, 1e-8, 3e-11, 1e-19, 1e-30, 1e17, 1e19, 1e30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_in_float32_and_what_it_loses(dtype: torch.dtype, scale: float) -> None:
    grads = [(torch.randn(size) * scale).to(dtype) for size in (1, 507, 16384, 16385, 40000)]
    grads.append(
        torch.cat([torch.full((8192,), 3e-5), torch.full((8192,), 3e4)])[torch.randperm(16384)].to(
            dtype
        )
    )
    grads[-1] *= scale > 0
    # whose roundings all go one way
    grads.append(torch.full((16384,), 1.2345678).to(dtype) * scale)
    truth = sum(grad.double().square().sum().item() for grad in grads)
    elsewhere = [torch.cat([grad[:1], grad])[1:] for grad in grads]
    with ptx.cuda_operators(90) as gpu:
        assert total(gpu, grads) == pytest.approx(truth, rel=1.5e-11, abs=0)
        assert total(gpu, elsewhere) == total(gpu, grads)  # wherever they lie


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_finite_where_every_gradient_is(dtype: torch.dtype, bad: float) -> None:
    with ptx.cuda_operators(90) as gpu:
        for place in (0, 17, 16383, 16384):
            grad = torch.randn(16400).to(dtype)
            grad[place] = bad
            assert (
                torch.tensor(total(gpu, [grad])).isnan()
                if bad != bad
                else total(gpu, [grad]) == torch.inf
            )
        largest = torch.full((20000,), torch.finfo(dtype).max, dtype=dtype)
        assert total(gpu, [largest]) == pytest.approx(
            largest.double().square().sum().item(), rel=1e-12
        )


def test_the_norm_of_a_gradient_past_two_to_the_31() -> None:
    """Its last block reads the gradient's end; that the others' sums are missing is what ends the
    test."""
    grad = torch.empty(2**31 + 100, dtype=torch.bfloat16)  # untouched pages cost nothing
    grad[-100:] = 1.0
    with ptx.cuda_operators(90, only=lambda blocks: [blocks - 1]) as gpu:
        with pytest.raises(ptx.Fault, match="reads byte 0 of memory of the launcher") as caught:
            total(gpu, [grad])
    assert caught.value.kernel == "total_kernel" and gpu.launches[0].bytes_read == 200


def test_few_operations_of_the_norm_are_in_double() -> None:
    elements = 4 * 16384
    with ptx.cuda_operators(90) as gpu:
        total(gpu, [torch.randn(elements).bfloat16()])
    opcodes = gpu.launches[0].opcodes
    assert sum(count for name, count in opcodes.items() if ".f64" in name) < 0.2 * elements


def test_rows_that_need_little_shared_memory_leave_the_limit_to_others() -> None:
    """A limit that another thread has lowered would refuse a launch whose own thread had just
    raised it."""
    with ptx.cuda_operators(90) as gpu:
        for classes in (5000, 30000, 5000):
            check(gpu.ops.cross_entropy_rows, draw(CASES["plain"], 1, classes, torch.float32))
            assert gpu.library.fake_lowest_limit() == 232_448
