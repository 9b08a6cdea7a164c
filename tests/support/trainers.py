"""A model that is quick to make."""

import torch


def tiny_llama(vocab_size=97, **config):
    """A Llama of one layer with random weights, the same each time, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, **{**sizes, **heads, **config})
    ).train()
