"""What docs/packed-attention.md lists under Limits, where no other test holds it."""

from __future__ import annotations

import pytest
import torch
from support.trainers import tiny_llama

import fastft
from fastft.attention.segment_attention import segment_attention
from fastft.attention.segments import Segments

EXAMPLES = [{"input_ids": list(range(3, 3 + length))} for length in (7, 5, 9)]


def test_a_second_derivative_raises() -> None:
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    cu = torch.tensor([0, 5, 8], dtype=torch.int32)
    out = segment_attention(q, q, q, Segments(cu, cu, 5, 5), causal=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.way("`torch_compile`", packing="exact")
@pytest.mark.slow
def test_a_compiled_model_breaks_its_graph_and_is_right() -> None:
    model = tiny_llama(attn_implementation="fastft").eval()
    batch = fastft.PackingCollator()(EXAMPLES)
    with torch.no_grad(), fastft.packed_attention(model):
        expected = model(**batch).logits
        torch._dynamo.reset()
        assert torch._dynamo.explain(model)(**batch).graph_break_count
        torch._dynamo.reset()
        actual = torch.compile(model, backend="eager")(**batch).logits
    torch.testing.assert_close(actual, expected)


def test_a_model_that_hands_on_no_positions_without_the_context() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
    config = GptOssConfig(**sizes, **heads, **experts, attn_implementation="fastft")
    model = GptOssForCausalLM(config).eval()
    batch = fastft.PackingCollator()(EXAMPLES)
    with torch.no_grad():
        alone = model(**batch).logits
        with fastft.packed_attention(model):
            torch.testing.assert_close(alone, model(**batch).logits)
