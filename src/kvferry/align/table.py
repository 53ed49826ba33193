"""Every aligner, by the name that its folder carries."""

ALIGNERS = {
    "bidirectional": "kvferry.align.bidirectional:BiDirectionalProjector",
    "elastic": "kvferry.align.elastic:ElasticBottleneck",
    "headwise": "kvferry.align.headwise:HeadwiseProjector",
    "hub_pair": "kvferry.align.hub_pair:HubPair",
    "identity": "kvferry.align.identity:Identity",
    "kv_projector": "kvferry.align.kv_projector:KVCacheProjector",
    "kv_projector_mlp": "kvferry.align.kv_projector_mlp:KVCacheProjectorMLP",
    "linear": "kvferry.align.linear:Linear",
    "map_projection": "kvferry.align.map_projection:MapProjectionAligner",
    "residual_mlp": "kvferry.align.residual_mlp:ResidualMLP",
    "zero_pad": "kvferry.align.zero_pad:ZeroPad",
}
