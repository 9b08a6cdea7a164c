"""The model of the examples: a Llama that trains on a CPU in seconds, with random weights."""

from transformers import LlamaConfig, LlamaForCausalLM


def make(vocab_size, hidden_size=128):
    """Two layers, with logits that are by far its largest tensor."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)
