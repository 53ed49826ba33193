"""Everything that touches transformers: loading, capture, injection, decoding."""
