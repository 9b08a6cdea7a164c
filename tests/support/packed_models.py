"""Tiny models of every kind of attention that packing must keep apart, and what their unpacked
stock runs give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastft.attention.attention import register_attention

register_attention()

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}
_SIZES |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_SLIDING = {
    **_GROUPED,
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MOE = {"experts_implementation": "eager"}  # the only one in float64


@dataclass(frozen=True)
class Tiny:
    """How to make one: its config class and sizes, its automatic class, the arguments of
    `from_config`."""

    config: str
    sizes: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    options: dict[str, Any] = field(default_factory=dict)
    position_ids_start: int = 0

    @property
    def causal(self) -> bool:
        return self.auto == "AutoModelForCausalLM"


def _masked(config: str, **sizes: Any) -> Tiny:
    start = sizes.pop("position_ids_start", 0)
    return Tiny(config, sizes, "AutoModelForMaskedLM", position_ids_start=start)


MODELS = {
    "llama": Tiny("LlamaConfig", _GROUPED),
    "qwen3": Tiny("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "mistral": Tiny("MistralConfig", {**_GROUPED, "sliding_window": 5}),  # a window in every layer
    "gemma2": Tiny("Gemma2Config", {**_SLIDING, "attn_logit_softcapping": 2.0}),
    "gemma3": Tiny("Gemma3TextConfig", _SLIDING),
    "gpt_oss": Tiny(
        "GptOssConfig", {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}, options=_MOE
    ),  # sinks
    "qwen2_moe": Tiny(  # its attention does not hear of its window
        "Qwen2MoeConfig",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        options=_MOE,
    ),
    "llama4": Tiny(  # chunks
        "Llama4TextConfig",
        {
            **_GROUPED,
            "head_dim": 8,
            "attention_chunk_size": 5,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
        }
        | {"num_hidden_layers": 4},
    ),
    "deepseek_v3": Tiny(  # values of another head size
        "DeepseekV3Config",
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
        }
        | {
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
        }
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        options=_MOE,
    ),
    "opt": Tiny("OPTConfig", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt2": Tiny("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bert": _masked("BertConfig", **_SIZES),
    "roberta": _masked("RobertaConfig", **{**_SIZES, "pad_token_id": 1}, position_ids_start=2),
    "distilbert": _masked(
        "DistilBertConfig", vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48
    ),
    "modernbert": _masked(
        "ModernBertConfig",
        **_SIZES,
        local_attention=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "eurobert": _masked("EuroBertConfig", **_GROUPED),
    "t5": Tiny(
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
        }
        | {"decoder_start_token_id": 0},
        "AutoModelForSeq2SeqLM",
    ),
}


def build(name: str, attention: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> nn.Module:
    """The model, the same weights at each call, far from the initial ones, in evaluation mode."""
    tiny = MODELS[name]
    config = getattr(transformers, tiny.config)(**{**tiny.sizes, **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, tiny.auto).from_config(
        config, attn_implementation=attention, **tiny.options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(dtype).eval()


def sequences(lengths: Sequence[int], seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]


def ends(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(tokens: Sequence[Tensor], position_ids_start: int = 0, rows: int = 1) -> dict[str, Any]:
    """A batch as the collator makes it, without labels; the sequences fill equal rows one after
    another."""
    lengths = [len(part) for part in tokens]
    positions = torch.cat([torch.arange(length) + position_ids_start for length in lengths])
    cu_seqlens = ends(lengths)
    return {
        "input_ids": torch.cat(list(tokens)).view(rows, -1),
        "position_ids": positions.view(rows, -1),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        .int()
        .view(rows, -1),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def packed_pairs(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Any]:
    """A batch of an encoder-decoder model."""
    batch = packed(sources)
    del batch["position_ids"]
    lengths = [len(part) for part in targets]
    decoder = {"decoder_cu_seq_lens": ends(lengths), "decoder_max_length": max(lengths)}
    return {**batch, **decoder, "decoder_input_ids": torch.cat(list(targets))[None]}


def gradients(model: nn.Module) -> Tensor:
    """All of a model's gradients in one vector; they are taken away."""
    flat = [
        parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None
    ]
    model.zero_grad()
    return torch.cat(flat)


def through(model: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and the gradients of a fixed random sum of them."""
    weights = torch.randn(
        logits.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    (logits * weights.to(logits.dtype)).sum().backward()
    return logits.detach(), gradients(model)


def unpacked(name: str, tokens: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and gradients of the stock model with eager attention, a sequence at a time."""
    model = build(name, "eager", dtype)
    options = {"use_cache": False} if MODELS[name].causal else {}
    return through(
        model, torch.cat([model(input_ids=part[None], **options).logits[0] for part in tokens])
    )


@contextmanager
def one_process_group(store: Any) -> Iterator[None]:
    """A gloo group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
