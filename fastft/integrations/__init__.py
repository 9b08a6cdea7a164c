"""What only transformers needs."""
