"""Cross-entropy: over logits, over hidden states, and lazily inside any model."""
