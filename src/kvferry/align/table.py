"""Every aligner, by the name that its folder carries."""

ALIGNERS = {
    "identity": "kvferry.align.identity:Identity",
    "linear": "kvferry.align.linear:Linear",
    "residual_mlp": "kvferry.align.residual_mlp:ResidualMLP",
    "zero_pad": "kvferry.align.zero_pad:ZeroPad",
}
