"""How what arrives joins what the receiver has: its layout, and (later) residual fusion and merging."""
