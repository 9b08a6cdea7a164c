"""`packed_boundaries`: its engines against counting in Python; CUDA and Triton as PTX on the
CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_examples import assert_same
from support.ptx.engines import ENGINES, Engine, operator
from support.segment_problems import LENGTHS, check, draw, run

from fastft.data.boundaries import BOUNDARIES, boundaries_reference
from fastft.data.collator import PackingCollator

CASES = [
    pytest.param(lengths, start, in_place, id=f"{name}-{start}-{in_place}")
    for name, lengths in LENGTHS.items()
    for start, in_place in ((0, False), (2, True))
]


@pytest.mark.parametrize(("lengths", "start", "in_place"), CASES)
@pytest.mark.parametrize("fill", [boundaries_reference, BOUNDARIES.native], ids=["eager", "cpp"])
def test_engines_count_right(fill: Any, lengths: list[int], start: int, in_place: bool) -> None:
    check(fill, lengths, start, in_place)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=20), st.integers(0, 3), st.booleans())
def test_any_lengths(lengths: list[int], start: int, in_place: bool) -> None:
    for fill in (boundaries_reference, BOUNDARIES.native):
        check(fill, lengths, start, in_place)


def test_large_batches_run_in_parallel_with_the_same_result() -> None:
    problem = draw([1, 200_000, 3, 65_536, 0, 70_001])
    theirs, ours = run(boundaries_reference, *problem), run(BOUNDARIES.native, *problem)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("lengths", [[2, 2], [4, -1], [5], [2]])
def test_kernel_refuses_lengths_that_do_not_add_up(lengths: list[int]) -> None:
    source, given = torch.arange(3), torch.tensor(lengths)
    out = torch.empty(3), torch.empty(3), torch.empty(3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"lengths (do not )?add up to"):
        BOUNDARIES.native(
            given,
            given,
            source,
            0,
            *(x.long() for x in out[:2]),
            out[2],
            torch.empty(len(lengths) + 1).int(),
        )


@pytest.mark.parametrize("far", [2**63 - 1, -(2**63)])
def test_numbers_at_the_ends_of_int64(far: int) -> None:
    """No sum of them and a position leaves int64 unseen: positions wrap, lengths are refused."""
    lengths, _, source = draw([2, 3])
    wrapped = torch.tensor([(far + i + 2**63) % 2**64 - 2**63 for i in (0, 1, 0, 1, 2)])
    found = run(BOUNDARIES.native, lengths, torch.tensor([far, far]), source, far)
    labels = torch.full_like(source, -100) if far > 0 else source
    assert torch.equal(found["position_ids"], wrapped) and torch.equal(found["labels"], labels)
    with pytest.raises(RuntimeError, match="lengths do not add up"):
        run(BOUNDARIES.native, torch.tensor([2, far]), torch.zeros(2).long(), source)


@pytest.mark.parametrize("broken", range(7))
def test_kernel_checks_its_arguments(broken: int) -> None:
    lengths, ignored, source = draw([2, 3])
    out = [source.clone(), source.clone(), source.int(), torch.empty(3, dtype=torch.int32)]
    arguments = [lengths, ignored, source, *out]
    arguments[broken] = arguments[broken].double() if broken < 3 else arguments[broken][:-1]
    with pytest.raises(RuntimeError, match="packed_boundaries: "):
        BOUNDARIES.native(*arguments[:3], 0, *arguments[3:])


@pytest.mark.parametrize("order", [None, 1])
@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize(("lengths", "start", "in_place"), CASES)
def test_gpu_kernels_as_ptx_count_right(
    engine: Engine, order: int | None, lengths: list[int], start: int, in_place: bool
) -> None:
    with operator(engine, "packed_boundaries", order=order) as (fill, launches):
        check(fill, lengths, start, in_place)
    assert launches


@pytest.mark.ptx
@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("segments", [1, 31, 33, 700, 2_500])
def test_gpu_kernels_as_ptx_count_right_over_many_segments(engine: Engine, segments: int) -> None:
    with operator(engine, "packed_boundaries") as (fill, _):
        check(fill, torch.randint(0, 9, (segments,)).tolist(), 0, False)


@pytest.mark.parametrize("chip", [80, 90, 100])
def test_triton_kernels_compile_without_spills(chip: int) -> None:
    """One kernel each, whatever the numbers of tokens and segments."""
    pytest.importorskip("triton")
    from support.triton_compiler import binary, compiled_for

    from fastft.data.boundaries_triton import packed_boundaries

    with compiled_for(chip) as kernels:
        for segments, tokens in ((1, 1), (16, 4096), (63, 507)):
            wide = {"dtype": torch.int64, "device": "meta"}
            narrow = {"dtype": torch.int32, "device": "meta"}
            lengths, source = torch.empty(segments, **wide), torch.empty(tokens, **wide)
            out = torch.empty_like(source), torch.empty_like(source), torch.empty(tokens, **narrow)
            packed_boundaries(
                lengths, lengths, source, 0, *out, torch.empty(segments + 1, **narrow)
            )
    assert len(kernels) == 6 and len({id(kernel) for kernel in kernels}) == 2
    for kernel in kernels[:2]:
        code = binary(kernel)
        assert (code.spills, code.stack, code.atomics) == (0, 0, 0)


def test_explicit_engine_never_falls_back() -> None:
    for impl in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=r"it computes cuda.* tensors, these are on cpu"):
            BOUNDARIES.resolve(impl, torch.device("cpu"))


@pytest.fixture(params=["cuda", "triton"])
def on_gpu(request: pytest.FixtureRequest) -> Any:
    """The function of one of the engines on a GPU."""
    device = torch.device("cuda", 0)
    reason = BOUNDARIES.unavailable(request.param, device)
    if request.param == "triton" and reason is not None:
        pytest.skip(reason)
    return BOUNDARIES.implementation(request.param, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "start", "in_place"), CASES)
def test_gpu_counts_right(on_gpu: Any, lengths: list[int], start: int, in_place: bool) -> None:
    check(on_gpu, lengths, start, in_place, "cuda")


@pytest.mark.gpu
def test_gpu_expands_a_batch_without_waiting_for_it(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the current stream, from pinned memory; the result is the CPU's."""
    examples = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 700, 1, 4096)]
    expected = PackingCollator(rows=2)(examples)
    flat = PackingCollator(rows=2, expand_on_device=True, impl="eager")(examples).pin_memory()
    monkeypatch.setattr(BOUNDARIES, "reference", on_gpu)
    flat.to("cuda")  # compiles what is to be compiled
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            batch = flat.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_same(batch.to("cpu"), expected)
