"""How good an answer or a cache is, and whether a difference is more than chance."""
