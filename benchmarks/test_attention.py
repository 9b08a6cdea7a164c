"""Attention of packed rows, forward and backward: documents of 512 tokens, a quarter of the heads
of a layer of Llama 3.2 1B, or all of a named model's.

The rival is transformers' sdpa attention with the mask that it builds for packed batches, which is
built before, as all layers share it; with a softcap, which that does not know, its eager one, which
keeps T x T scores of every head, up to 2048 tokens in float32. The bare work is torch's
attention of each document by itself, from tensors cut out before. Errors are of the output and the
gradients of q, k, v, as norms, against float64.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import models
import pytest
import torch
import torch.nn.functional as F
from compare import compare
from errors import check, peaks_mib

from fastft.attention.segment_attention import segment_attention
from fastft.attention.segments import Segments

DOCUMENT, WINDOW = 512, 128


class Layer(NamedTuple):
    """Query heads, key heads, numbers of each."""

    heads: int
    groups: int
    size: int


QUARTER = Layer(8, 2, 64)  # of a layer of Llama 3.2 1B
OPTIONS = {
    "causal": {"causal": True},
    "both_ways": {"causal": False},
    "window": {"causal": True, "window": WINDOW},
    "softcap": {"causal": True, "softcap": 50.0},
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def make(layer, tokens, device, dtype):
    """q, k, v as projections give them, the gradient of the output, and the boundaries."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, layer.size, device=device)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (layer.heads, layer.groups, layer.groups)
    )
    d_out = torch.randn(1, tokens, layer.heads, layer.size, device=device).to(dtype)
    cu_seqlens = torch.arange(0, tokens + 1, DOCUMENT, dtype=torch.int32, device=device)
    return q, k, v, d_out, Segments(cu_seqlens, cu_seqlens, DOCUMENT, DOCUMENT)


def masks(tokens, options, device, dtype):
    """transformers' mask of the packed batch for its sdpa and its eager attention."""
    from transformers.masking_utils import (
        and_masks,
        bidirectional_mask_function,
        causal_mask_function,
        eager_mask,
        find_packed_sequence_indices,
        packed_sequence_mask_function,
        sdpa_mask,
        sliding_window_overlay,
    )

    positions = torch.arange(tokens, device=device)[None] % DOCUMENT
    parts = [causal_mask_function if options["causal"] else bidirectional_mask_function]
    parts += [sliding_window_overlay(options["window"])] if "window" in options else []
    parts.append(packed_sequence_mask_function(find_packed_sequence_indices(positions)))
    shape = {
        "batch_size": 1,
        "q_length": tokens,
        "kv_length": tokens,
        "mask_function": and_masks(*parts),
    }
    shape |= {"allow_is_causal_skip": False, "device": device}
    return lambda: sdpa_mask(**shape), lambda: eager_mask(dtype=dtype, **shape)


def attentions(layer, tokens, options, device, dtype, segments):
    """Ours and transformers' by name, each from q, k, v to (1, T, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    module = SimpleNamespace(
        num_key_value_groups=layer.heads // layer.groups,
        is_causal=True,
        training=True,
        head_dim=layer.size,
    )
    sdpa, eager = masks(tokens, options, device, dtype)
    found = {"ours": lambda q, k, v: segment_attention(q, k, v, segments, **options)}
    cap = options.get("softcap")
    if cap is None:
        mask = sdpa()
        found["transformers sdpa"] = lambda q, k, v: sdpa_attention_forward(
            module, q, k, v, mask, scaling=layer.size**-0.5
        )[0]
    elif tokens <= 2048 and dtype == torch.float32:
        added = eager()
        found["transformers eager"] = lambda q, k, v: eager_attention_forward(
            module, q, k, v, added, scaling=layer.size**-0.5, softcap=cap
        )[0]
    return found


def step(attention, q, k, v, d_out):
    out = attention(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), d_out)


def each_document(q, k, v, d_out, options):
    """The bare work: nothing but torch's attention, of documents that lie by themselves."""
    cut = [
        [part.detach().clone().requires_grad_() for part in parts]
        for parts in zip(*(tensor.split(DOCUMENT, 2) for tensor in (q, k, v)), strict=True)
    ]
    d_cut = [part.transpose(1, 2).contiguous() for part in d_out.split(DOCUMENT, 1)]

    def run():
        for parts, d_part in zip(cut, d_cut, strict=True):
            out = F.scaled_dot_product_attention(
                *parts, is_causal=options["causal"], enable_gqa=True
            )
            torch.autograd.grad(out, parts, d_part)

    return run


def truth(layer, options):
    """Plain attention, a document at a time."""

    def attention(q, k, v):
        outs = []
        for at in range(0, q.shape[2], DOCUMENT):
            one, keys, values = (tensor[:, :, at : at + DOCUMENT] for tensor in (q, k, v))
            keys, values = (
                tensor.repeat_interleave(layer.heads // layer.groups, 1)
                for tensor in (keys, values)
            )
            scores = one @ keys.mT * layer.size**-0.5
            if "softcap" in options:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            places = torch.arange(one.shape[2], device=q.device)
            behind = places[:, None] - places
            hidden = (behind < 0) & options["causal"] | (behind >= options.get("window", DOCUMENT))
            outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values)
        return torch.cat(outs, 2).transpose(1, 2)

    return attention


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_packed_attention(benchmark, device, small, tokens, options, dtype):
    if (
        device == "cpu"
        and options != OPTIONS["causal"]
        and (tokens > 2048 or dtype == torch.bfloat16)
    ):
        pytest.skip("on a CPU long rows and half precision are measured for causal attention")
    if device == "cpu" and tokens > 2048 and dtype == torch.bfloat16:
        pytest.skip("half precision is slow on a CPU: measured at 2048 tokens")
    if device == "cuda" and tokens > 2048 and dtype == torch.float32:
        pytest.skip("long rows are not trained in fp32 on a GPU")
    tokens = 2 * DOCUMENT if small else tokens
    measure(benchmark, QUARTER, tokens, options, device, dtype)


@pytest.mark.parametrize("model", models.NAMES)
def test_attention_of_model(benchmark, device, small, model):
    """A whole layer of a named model, with its softcap, or its window where a document is longer;
    on two cores 1024 tokens in fp32."""
    config = models.config(model)
    layer = Layer(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    options = {"causal": True}
    if cap := getattr(config, "attn_logit_softcapping", None):
        options["softcap"] = cap
    if (getattr(config, "sliding_window", None) or DOCUMENT) < DOCUMENT:
        options["window"] = config.sliding_window
    dtype, tokens = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 1024)
    layer = Layer(4, 2, 16) if small else layer
    measure(benchmark, layer, 2 * DOCUMENT if small else tokens, options, device, dtype)


def measure(benchmark, layer, tokens, options, device, dtype):
    q, k, v, d_out, segments = make(layer, tokens, device, dtype)
    found = attentions(layer, tokens, options, device, dtype, segments)
    info, (heads, groups, size) = benchmark.extra_info, layer
    info["shape"] = f"T={tokens} of {DOCUMENT}, H={heads}, G={groups}, D={size}"

    def checked():
        info["relative_errors"] = check(
            {**found, "plain torch": truth(layer, options)},
            truth(layer, options),
            (q, k, v),
            ("out", "d_query", "d_key", "d_value"),
            plain="plain torch",
            terms=2 * DOCUMENT,
            upstream=d_out,
        )

    steps = {name: lambda run=run: step(run, q, k, v, d_out) for name, run in found.items()}
    bare = each_document(q, k, v, d_out, options) if options.keys() == {"causal"} else None
    # read q, k, v, out, dout twice, write out, dq, dk, dv
    moved = dtype.itemsize * tokens * size * (2 * (2 * heads + 2 * groups) + 3 * heads + 2 * groups)
    rivals = {name: run for name, run in steps.items() if name != "ours"}
    compare(benchmark, steps["ours"], rivals, check=checked, bytes_moved=moved, bare=bare)
    info["peak_mib"] = peaks_mib(steps, q, k, v)


@pytest.mark.parametrize("name", ["causal", "window", "softcap"])
def test_memory_growth(benchmark, device, small, name):
    """Peak memory over tokens: ours doubles with them; transformers', with the mask, is measured up
    to 8192."""
    ours, stock = {}, {}
    options = OPTIONS[name]
    for tokens in (1024, 2048) if small else (4096, 8192, 16384, 32768):
        q, k, v, d_out, segments = make(QUARTER, tokens, device, torch.float32)

        def run(q=q, k=k, v=v, d_out=d_out, segments=segments):
            return step(lambda *qkv: segment_attention(*qkv, segments, **options), q, k, v, d_out)

        ours[tokens] = peaks_mib({"ours": run}, q, k, v)["ours"]
        if tokens <= 8192 and name != "softcap":

            def with_mask(tokens=tokens, q=q, k=k, v=v, d_out=d_out, segments=segments):
                found = attentions(QUARTER, tokens, options, device, torch.float32, segments)
                return step(found["transformers sdpa"], q, k, v, d_out)

            stock[tokens] = peaks_mib({"stock": with_mask}, q, k, v)["stock"]
    info = benchmark.extra_info
    info["peak_mib"] = {"ours": ours, "transformers sdpa and its mask": stock}
    info["growth"] = [
        round(after / before, 3) for before, after in itertools.pairwise(ours.values())
    ]
    print(f"\n{benchmark.name}: {dict(info)}")
    benchmark.pedantic(run, rounds=1)
