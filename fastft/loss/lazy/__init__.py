"""Lazy logits: what a model's output head returns in training instead of T x V numbers."""
