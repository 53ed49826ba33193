"""Every fuser, by the name that its folder carries."""

FUSERS = {
    "c2c": "kvferry.fuse.c2c:C2CFuser",
    "gated_residual": "kvferry.fuse.gated_residual:GatedResidual",
    "prepend": "kvferry.fuse.prepend:Prepend",
    "replace": "kvferry.fuse.replace:Replace",
}
