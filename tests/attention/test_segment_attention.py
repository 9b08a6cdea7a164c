"""`segment_attention`: every engine and option against attention of each segment by itself."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import flash_kernels
from support.attention_problems import (
    BATCHES,
    GROUPS,
    HEADS,
    OPTIONS,
    SIZE,
    VALUE_SIZE,
    assert_as_each_segment,
    attended_alone,
    each_segment,
    inputs,
    results,
    segments_of_lengths,
)
from support.numerics import assert_no_worse
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastft import _native
from fastft.attention import attention_cpp
from fastft.attention import segment_attention as room
from fastft.attention.segment_attention import segment_attention
from fastft.attention.segments import Segments

MASKED = {"bias", "bool_mask", "float_mask", "all"}
KNOWN = {  # the options that an engine knows
    "auto": set(OPTIONS),
    "blocks": set(OPTIONS),
    "cpp": set(OPTIONS) - MASKED,
    "flash_cpu": set(OPTIONS) - MASKED - {"softcap"},
}


@pytest.mark.parametrize(
    ("impl", "name"), [(impl, name) for impl in KNOWN for name in OPTIONS if name in KNOWN[impl]]
)
@pytest.mark.parametrize("batch", BATCHES)
def test_each_option(batch: str, name: str, impl: str, poisoned_empty: None) -> None:
    assert_as_each_segment(batch, OPTIONS[name], torch.float32, impl)


@pytest.mark.parametrize(
    ("impl", "name"),
    [("auto", "all"), *((impl, "sinks_and_window") for impl in KNOWN), ("cpp", "softcap")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_dtype(name: str, impl: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    if (impl, dtype) == ("cpp", torch.float16):
        with pytest.raises(RuntimeError, match=r"takes float32 and bfloat16, got torch\.float16"):
            assert_as_each_segment("ragged", OPTIONS[name], dtype, impl)
    else:
        assert_as_each_segment("ragged", OPTIONS[name], dtype, impl)


def test_kernel_reads_no_keys_that_nobody_sees() -> None:
    """What lies beyond the window of a whole block of queries is left out, and not weighed with
    0."""
    q, k, v = (torch.randn(1, 1, 1024, 8, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[:, :, :512], v[:, :, :512] = torch.nan, torch.nan
    out = segment_attention(
        q, k, v, segments_of_lengths((1024,)), causal=True, window=64, impl="cpp"
    )[:, 768:]
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.isfinite().all()
    assert all(grad[:, :, 768:].isfinite().all() for grad in grads)


@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_kernel_keeps_nan(what: str) -> None:
    """NaN reaches those who see it; in values also neighbours, whose weight for it is 0, as in any
    product, but no other segment."""
    call = {
        name: torch.randn(1, 1, 150, 16, requires_grad=True) for name in ("query", "key", "value")
    }
    with torch.no_grad():
        call[what][:, :, 30] = torch.nan
    out = segment_attention(
        **call, segments=segments_of_lengths((100, 50)), causal=True, impl="cpp"
    )
    reached = out.isnan().any(-1).flatten()
    seen = torch.zeros(150, dtype=torch.bool)
    seen[30 : 31 if what == "query" else 100] = True
    assert reached[seen].all()
    assert not reached[~seen][0 if what != "value" else 30 :].any()


def _kernel_call(
    lengths: tuple[int, ...],
    keys: tuple[int, ...],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    return {
        "query": draw(1, heads[0], sum(lengths), sizes[0]),
        "key": draw(1, heads[1], sum(keys), sizes[0]),
        "value": draw(1, heads[1], sum(keys), sizes[1]),
    }


def _kernel_results(call: dict[str, Any], segments: Segments) -> list[Tensor]:
    """Those of the kernel, which are as near to float64 as plain torch."""
    found, plain = (
        results(segment_attention, segments, call, impl=impl) for impl in ("cpp", "eager")
    )
    wide = {
        name: value.detach().double().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in call.items()
    }
    exact = results(segment_attention, segments, wide, impl="eager")
    terms = call["query"].shape[2] + call["key"].shape[2] + call["query"].shape[3]
    for mine, torchs, truth in zip(found, plain, exact, strict=True):
        assert_no_worse(mine, torchs, truth, "attention", terms=terms)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": False},
        {"causal": True, "window": 70, "softcap": 3.0},
        {"causal": False, "window": 130},
    ],
)
@pytest.mark.parametrize("sizes", [(1, 1), (63, 5), (64, 64), (80, 96), (256, 128)])
def test_kernel_of_any_size(
    sizes: tuple[int, int], options: dict[str, Any], dtype: torch.dtype, poisoned_empty: None
) -> None:
    """Heads that are no multiple of a tile, segments about the length of its blocks, tokens that
    lie end to end."""
    lengths = (47, 0, 1, 193, 100)
    call = _kernel_call(lengths, lengths, (6, 2), sizes, dtype)
    _kernel_results({**call, **options}, segments_of_lengths(lengths))


def test_kernel_of_more_keys_than_queries(poisoned_empty: None) -> None:
    lengths, keys = (47, 0, 193), (100, 3, 250)
    call = _kernel_call(lengths, keys, (4, 2), (16, 24))
    found = _kernel_results({**call, "causal": False}, segments_of_lengths(lengths, keys))
    assert all((grad[:, :, 100:103] == 0).all() for grad in found[2:])


def test_kernel_in_waves_of_any_number_of_threads() -> None:
    """Sums of keys and values are larger than one wave's, and how many there are is up to the
    threads: bits are not."""
    lengths, found, before = (530, 294), [], torch.get_num_threads()
    call = {**_kernel_call(lengths, lengths, (16, 8), (256, 256)), "causal": True}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(_kernel_results(call, segments_of_lengths(lengths)))
    finally:
        torch.set_num_threads(before)
    for tensors in zip(*found, strict=True):
        assert all(torch.equal(tensors[0], other) for other in tensors[1:])


@pytest.mark.parametrize("options", [(False, 0, 0.0), (True, 0, 2.0), (True, 5, 0.0)])
def test_kernels_operators(options: tuple[bool, int, float]) -> None:
    """They are what their references are, for torch too; a row of nothing but -Inf gives 0."""
    call = _kernel_call((9, 4), (9, 4), (4, 2), (8, 8))
    query, key, value = (call[name].detach() for name in ("query", "key", "value"))
    key[:, :, 9:] = -torch.inf
    query[:, :, 9:] = 1.0
    pieces = torch.tensor([[0, 0, 9, 0, 9], [0, 9, 13, 9, 13]])
    rest = (pieces, 0.3, *options)
    d_out = torch.randn(1, 4, 13, 8)
    filled = []
    for forward, backward in (
        (attention_cpp.FORWARD.native, attention_cpp.BACKWARD.native),
        (attention_cpp.FORWARD.reference, attention_cpp.BACKWARD.reference),
    ):
        out, lse, grads = (
            torch.empty(1, 4, 13, 8),
            torch.empty(1, 4, 13),
            [torch.empty_like(tensor) for tensor in (query, key, value)],
        )
        forward(out, lse, query, key, value, *rest)
        backward(*grads, d_out, query, key, value, out, lse, *rest)
        filled.append((out, lse, *(grad[:, :, :9] for grad in grads)))
    for native, reference in zip(*filled, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-5, atol=1e-5)
    assert (out[:, :, 9:] == 0).all() or options[2]
    torch.library.opcheck(
        attention_cpp.FORWARD.native,
        (torch.empty(1, 4, 13, 8), torch.empty(1, 4, 13), query, key, value, *rest),
    )
    torch.library.opcheck(
        attention_cpp.BACKWARD.native,
        (*grads, d_out, query, key, value, out, lse, *rest),
    )


def test_gradients_of_shared_key_heads_are_as_exact_as_sdpas() -> None:
    """They are sums over four query heads and hundreds of queries: what is added up in 16 bits
    shows."""
    torch.manual_seed(0)
    lengths, group = (512, 257), 4
    masks = [torch.ones(n, n).tril() for n in lengths]
    leaves = [torch.randn(1, heads, sum(lengths), 64).bfloat16() for heads in (8, 2, 2)]
    upstream = torch.randn(1, sum(lengths), 8, 64).bfloat16()

    def gradients(attend: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        return torch.autograd.grad(attend(*tensors), tensors, upstream.to(dtype))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (tensor.repeat_interleave(group, 1) for tensor in (k, v))
        mask = torch.block_diag(*masks).bool()
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segment_attention(q, k, v, segments_of_lengths(lengths), causal=True)

    exact = gradients(sdpa, torch.float64)
    of_sdpa, found = gradients(sdpa, torch.bfloat16), gradients(ours, torch.bfloat16)
    for what, mine, rival, best in zip("qkv", found, of_sdpa, exact, strict=True):
        assert_no_worse(mine, rival, best, f"d_{what}", terms=group * 512 + 64)
        assert (mine - best).norm() <= (rival - best).norm(), what


@pytest.mark.parametrize("name", ["causal", "window", "all", "chunks"])
def test_reference(name: str) -> None:
    assert_as_each_segment("ragged", OPTIONS[name], torch.float32, "eager")


def test_values_of_another_head_size() -> None:
    assert_as_each_segment("ragged", OPTIONS["causal"], torch.float32, "auto", VALUE_SIZE)


@pytest.mark.parametrize("impl", ["auto", "blocks"])
def test_cross_attention(impl: str, poisoned_empty: None) -> None:
    """Queries of one length, keys of another; the keys of a segment without queries get zeros."""
    lengths, keys = (5, 0, 9), (4, 3, 20)
    q = torch.randn(1, HEADS, 14, SIZE, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(1, GROUPS, 27, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    out = segment_attention(q, k, v, segments_of_lengths(lengths, keys), causal=False, impl=impl)
    parts = [
        attended_alone(q[0, :, :5], k[0, :, :4], v[0, :, :4], False),
        attended_alone(q[0, :, 5:], k[0, :, 7:], v[0, :, 7:], False),
    ]
    truth = torch.cat(parts)[None]
    weights = torch.randn_like(out)
    pairs = zip(
        (out, *_grads(out, weights, q, k, v)),
        (truth, *_grads(truth, weights, q, k, v)),
        strict=True,
    )
    for actual, exact in pairs:
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["causal", "all"])
def test_no_tokens(name: str) -> None:
    q, k = torch.randn(1, HEADS, 0, SIZE, requires_grad=True), torch.randn(1, GROUPS, 0, SIZE)
    options = {
        key: value for key, value in OPTIONS[name].items() if key in ("causal", "window", "softcap")
    }
    out = segment_attention(q, k, k, segments_of_lengths((0,)), **options)
    out.sum().backward()
    assert out.shape == (1, 0, HEADS, SIZE)
    assert q.grad.shape == q.shape


def _grads(out: Tensor, weights: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, weights, retain_graph=True)


def test_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where a block of queries is far shorter than a segment."""
    monkeypatch.setattr(room, "_BLOCK_SCORES", 1 << 10)
    assert_as_each_segment("long", OPTIONS["all"], torch.float32, "blocks")


@pytest.mark.parametrize("impl", ["eager", "blocks"])
def test_query_that_sees_nothing(impl: str) -> None:
    """A mask may leave a padding token no key: zeros, no NaN."""
    call = inputs("ragged", {"causal": False}, torch.float32)
    mask = torch.ones(1, 1, 31, 31, dtype=torch.bool)
    mask[..., 3, :] = False
    segments = segments_of_lengths((11, 7, 0, 13))
    ours = results(segment_attention, segments, call, mask=mask, impl=impl)
    assert all(tensor.isfinite().all() for tensor in ours)
    assert (ours[0][0, 3] == 0).all()


@pytest.mark.parametrize("impl", ["cpp", "flash_cpu", "blocks"])
def test_any_strides(impl: str) -> None:
    """Tensors whose last dimension is not the dense one, or that are expanded."""
    dtype, tolerance = (torch.float32, 1e-5) if impl == "cpp" else (torch.float64, 1e-12)
    wide = torch.randn(1, HEADS, 31, SIZE, 2, dtype=dtype, requires_grad=True)
    q, k = wide[..., 0], wide[:, :1, :, :, 1].expand(-1, GROUPS, -1, -1)
    segments = segments_of_lengths((11, 7, 13))
    results = []
    for query, key in ((q, k), (q.contiguous(), k.contiguous())):
        out = segment_attention(query, key, key, segments, causal=True, impl=impl)
        # the gradient of out is expanded too
        results.append((out, *torch.autograd.grad(out.sum(), wide)))
    truth = each_segment((11, 7, 13), query=q, key=k, value=k, causal=True)
    results.append((truth, *torch.autograd.grad(truth.sum(), wide)))
    for tensors in zip(*results, strict=True):
        for actual in tensors[:2]:
            torch.testing.assert_close(actual, tensors[2], rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40) | st.just(150), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 50) | st.just(110),
    chunk=st.none() | st.integers(1, 50),
    causal=st.booleans(),
    impl=st.sampled_from(["cpp", "flash_cpu", "blocks"]),
)
def test_any_lengths(
    lengths: list[int], window: int | None, chunk: int | None, causal: bool, impl: str
) -> None:
    options = {"causal": causal, "window": window, "chunk": chunk}
    q, k, v = (
        torch.randn(1, heads, sum(lengths), SIZE).double() for heads in (HEADS, GROUPS, GROUPS)
    )
    dtype, tolerance = (torch.float32, 1e-5) if impl == "cpp" else (torch.float64, 1e-12)
    ours = segment_attention(
        *(tensor.to(dtype) for tensor in (q, k, v)),
        segments_of_lengths(tuple(lengths)),
        impl=impl,
        **options,
    )
    truth = each_segment(tuple(lengths), query=q, key=k, value=v, **options)
    torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["eager", "blocks"])
def test_dropout_gradients(impl: str) -> None:
    """Numerical differences, with the random numbers held."""
    shapes = ((1, 2, 9, 4), (1, 1, 9, 4), (1, 1, 9, 4))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attend(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return segment_attention(
            *tensors, segments_of_lengths((4, 5)), causal=True, dropout=0.4, impl=impl
        )

    assert torch.autograd.gradcheck(attend, leaves)


def test_dropout_keeps_the_mean() -> None:
    q, k, v = torch.randn(1, 4, 512, 8), torch.randn(1, 4, 512, 8), torch.ones(1, 4, 512, 8)
    torch.manual_seed(2)
    out = segment_attention(q, k, v, segments_of_lengths((256, 256)), causal=False, dropout=0.25)
    assert 0.99 < out.mean() < 1.01
    assert out.std() > 0.01


@pytest.mark.parametrize("impl", ["cpp", "flash_cpu", "blocks"])
def test_the_same_bits_each_time(impl: str) -> None:
    call = inputs("long", OPTIONS["window"], torch.float32)
    runs = [
        results(segment_attention, segments_of_lengths((507, 130)), call, impl=impl)
        for _ in range(2)
    ]
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(
                    self.elements, tensor.untyped_storage().nbytes() // tensor.element_size()
                )
        return result


@pytest.mark.parametrize("name", ["causal", "window", "softcap", "sinks"])
def test_memory_is_linear(name: str) -> None:
    """No tensor of the forward or the backward is larger than q, or than a block of scores."""
    lengths = (64,) * 64
    q, k, v = (torch.randn(1, 1, 4096, 4, requires_grad=True) for _ in range(3))
    options = {**OPTIONS[name], **({"sinks": torch.zeros(1)} if name == "sinks" else {})}
    with _Largest() as largest:
        segment_attention(q, k, v, segments_of_lengths(lengths), **options).sum().backward()
    assert largest.elements == q.numel()


@pytest.mark.parametrize(
    "name",
    ["causal", "both_ways", "window", "window_both_ways", "sinks", "sinks_and_window", "chunks"],
)
@pytest.mark.parametrize("batch", ["ragged", "rows"])
def test_cuda_arguments(batch: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to the CUDA kernels and made of what they return; the kernels themselves do
    not run here."""
    calls, options = flash_kernels.install(monkeypatch), OPTIONS[name]
    monkeypatch.setattr(room.ATTENTION, "resolve", lambda *args: "flash_cuda")
    lengths, _ = BATCHES[batch]
    call = inputs(batch, options, torch.float64)
    ours = results(segment_attention, segments_of_lengths(lengths), call)
    truth = results(lambda **kwargs: each_segment(lengths, **kwargs), None, call)
    for actual, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
    longest = min(max(lengths), options.get("chunk") or max(lengths))
    assert [(call["max_q"], call["max_k"]) for call in calls] == [(longest, longest)]


@pytest.mark.parametrize("name", flash_kernels.NAMES)
def test_the_stand_ins_take_what_torchs_kernels_take(name: str) -> None:
    """In torch's order; of what they do not know torch has a default."""
    given, kernel = (
        getattr(torch.ops.aten, name).default._schema.arguments,
        flash_kernels.KERNELS[name],
    )
    taken = inspect.signature(kernel).parameters
    assert [one.name for one in given if not one.kwarg_only] == [
        parameter.name
        for parameter in taken.values()
        if parameter.kind is not parameter.KEYWORD_ONLY
    ]
    assert {one.name for one in given} >= set(taken)
    assert all(one.has_default_value() for one in given if one.name not in taken)


def test_a_longest_segment_that_is_said_to_be_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels would leave out what is beyond, without a word."""
    calls = flash_kernels.install(monkeypatch)
    monkeypatch.setattr(room.ATTENTION, "resolve", lambda *args: "flash_cuda")
    segments = dataclasses.replace(
        segments_of_lengths((30, 33, 63)), max_seqlen_q=40, max_seqlen_k=7
    )
    call = inputs("rows", {"causal": True}, torch.float64)
    out = segment_attention(**call, segments=segments)
    torch.testing.assert_close(out, each_segment((30, 33, 63), **call), rtol=1e-12, atol=1e-12)
    assert (calls[0]["max_q"], calls[0]["max_k"]) == (63, 63)


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": True, "window": 5}, {"causal": False, "window": 5}]
)
def test_flash_attn_arguments(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def flash_attn_varlen_func(q: Tensor, *tensors: Any, **kwargs: Any) -> Tensor:
        seen.update(
            kwargs,
            shapes=[tuple(tensor.shape) for tensor in (q, *tensors[:2])],
            longest=tensors[4:],
        )
        return q.clone()

    fake = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(room.ATTENTION, "resolve", lambda *args: "flash_attn")
    call = inputs("rows", options, torch.float32)
    out = segment_attention(
        **call, segments=segments_of_lengths((30, 33, 63)), softcap=3.0, dropout=0.1
    )
    left = options.get("window", 0) - 1
    assert torch.equal(out, call["query"].transpose(1, 2))
    assert seen == {
        "shapes": [(126, HEADS, SIZE), (126, GROUPS, SIZE), (126, GROUPS, SIZE)],
        "longest": (63, 63),
        "dropout_p": 0.1,
        "softmax_scale": SIZE**-0.5,
        "causal": options["causal"],
        "window_size": (left, 0 if options["causal"] else left),
        "softcap": 3.0,
    }


def _bad(**changes: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"query": torch.zeros(1, 4, 6, 8), "key": torch.zeros(1, 2, 6, 8)}
    call |= {
        "value": torch.zeros(1, 2, 6, 8),
        "segments": segments_of_lengths((2, 4)),
        "causal": True,
    }
    return {**call, **changes}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (_bad(query=torch.zeros(4, 6, 8)), ValueError, "rows, heads, tokens, head size"),
        (
            _bad(key=torch.zeros(1, 3, 6, 8), value=torch.zeros(1, 3, 6, 8)),
            ValueError,
            "multiple of its heads",
        ),
        (_bad(value=torch.zeros(1, 2, 5, 8)), ValueError, "rows, heads, tokens, head size"),
        (_bad(key=torch.zeros(1, 2, 6, 4)), ValueError, "the key's head size"),
        (_bad(value=torch.zeros(1, 2, 6, 8).double()), TypeError, "share a floating dtype"),
        (_bad(window=0), ValueError, "window must be positive"),
        (_bad(chunk=-1), ValueError, "chunk must be positive"),
        (_bad(softcap=0.0), ValueError, "softcap must be positive or None, got 0"),
        (_bad(dropout=1.0), ValueError, r"dropout must be in \[0, 1\)"),
        (
            _bad(segments=segments_of_lengths((2, 5))),
            ValueError,
            "cu_seqlens_q must rise from 0 to 6",
        ),
        (_bad(segments=segments_of_lengths((2, 4), (3, 3))), ValueError, "as many as queries"),
        (_bad(segments=segments_of_lengths((2, 4), (0, 6)), causal=False), ValueError, "have keys"),
        (_bad(impl="fast"), ValueError, "impl must be one of"),
        (_bad(impl="flash_cuda"), RuntimeError, "these are on cpu"),
        (_bad(impl="cpp", dropout=0.5), RuntimeError, "no dropout"),
        (_bad(impl="cpp", bias=torch.ones(1, 1, 6, 6)), RuntimeError, "neither bias nor mask"),
        (_bad(impl="flash_cpu", softcap=1.0), RuntimeError, "no softcap"),
        (_bad(impl="flash_cpu", dropout=0.5), RuntimeError, "no dropout"),
        (
            _bad(impl="flash_cpu", mask=torch.ones(1, 1, 6, 6).bool()),
            RuntimeError,
            "neither bias nor mask",
        ),
    ],
)
def test_bad_calls(call: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        segment_attention(**call)


def test_segment_over_two_rows() -> None:
    q = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match="must lie in one row"):
        segment_attention(q, q, q, segments_of_lengths((3, 5)), causal=True)


def test_tiles_of_a_window_are_linear() -> None:
    """The keys that all calls of the CPU kernel read grow with the tokens, not with their
    square."""

    def read(length: int) -> int:
        q = torch.zeros(1, 1, length, 8)
        seen: list[int] = []
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

        def count(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(query.shape[2] * key.shape[2])
            return kernel(query, key, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", count)
            segment_attention(
                q, q, q, segments_of_lengths((length,)), causal=True, window=64, impl="flash_cpu"
            )
        return sum(seen)

    assert read(4096) < 2.1 * read(2048)


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "baseline", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_taken_where_it_was_timed(isa, dtype, monkeypatch):
    asked = room._Asked(dtype)
    monkeypatch.setattr(_native, "cpu_isa", lambda: isa)
    for intel, expected in (
        (False, isa not in ("baseline", None)),
        (True, isa == "avx2"),
    ):
        monkeypatch.setattr(_native, "is_intel", lambda intel=intel: intel)
        assert attention_cpp.is_ahead() == expected
        reason = room._cpp(torch.device("cpu"), asked)
        assert (reason is None) == expected
        assert room._cpp(torch.device("cpu"), asked._replace(by_name=True)) is None
