"""Attention that keeps the sequences of a packed batch apart, and the probe that sees whether a
model does."""
