"""kvferry: hand what one language model has read to another one, as a KV cache."""

__version__ = "0.1.0"
