"""Shapes of named models, from transformers' own configurations; no weights, and no hub."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# model type, hidden size, intermediate size, layers, heads, key heads, head size, vocabulary, tied
_SIZES = {
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 64, 49_152, True),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True),
    "qwen3-8b": ("qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936, False),
    "gemma-2-2b": ("gemma2", 2304, 9216, 26, 8, 4, 256, 256_000, True),
    "gpt-oss-20b": ("gpt_oss", 2880, 2880, 24, 64, 8, 64, 201_088, False),
    "llama-3-8b": ("llama", 4096, 14_336, 32, 32, 8, 128, 128_256, False),
}
NAMES = tuple(_SIZES)


def config(name: str) -> PreTrainedConfig:
    """As published, what is not a size by the model type's own defaults: Gemma 2's softcaps, the
    windows and experts of GPT-OSS."""
    kind, hidden, intermediate, layers, heads, groups, size, classes, tied = _SIZES[name]
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        vocab_size=classes,
        tie_word_embeddings=tied,
    )


class Parameters(NamedTuple):
    """Of a training: their shapes, and in words what they are."""

    shapes: list[torch.Size]
    told: str


@functools.cache
def parameters(name: str, rank: int | None, elements: int) -> Parameters:
    """All that a full fine-tune trains, or LoRA of `rank` on every linear layer of the blocks; as
    many blocks as hold at most `elements`, and embeddings where all blocks do."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
    blocks: dict[str, list[torch.Size]] = {}
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for path, parameter in model.named_parameters():
        block = re.search(r"\.layers\.(\d+)\.", path)
        of_block = blocks.setdefault(block[1] if block else "rest", [])
        if rank is None:
            of_block.append(parameter.shape)
        elif block and path in linear:
            rows, columns = parameter.shape
            of_block += [torch.Size((rank, columns)), torch.Size((rows, rank))]
    rest, kept = blocks.pop("rest"), list[torch.Size]()
    count = 0
    for shapes in blocks.values():
        if sum(shape.numel() for shape in kept + shapes) > elements:
            break
        kept, count = kept + shapes, count + 1
    whole = count == len(blocks) and sum(s.numel() for s in kept + rest) <= elements
    told = "all" if whole else f"{count} of {len(blocks)} blocks, no embeddings"
    what = "full" if rank is None else f"LoRA {rank}"
    return Parameters(kept + rest if whole else kept, f"{what}, {told}")
