"""fastft: faster, leaner and exact fine-tuning with Hugging Face Trainer."""

__version__ = "0.1.0"
