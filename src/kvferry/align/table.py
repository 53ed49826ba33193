"""Every aligner, by the name that its folder carries."""

ALIGNERS = {
    "bidirectional": "kvferry.align.bidirectional:BiDirectionalProjector",
    "blockwise": "kvferry.align.blockwise:Blockwise",
    "classwise": "kvferry.align.classwise:Classwise",
    "elastic": "kvferry.align.elastic:ElasticBottleneck",
    "headwise": "kvferry.align.headwise:HeadwiseProjector",
    "hub_pair": "kvferry.align.hub_pair:HubPair",
    "identity": "kvferry.align.identity:Identity",
    "interpolate": "kvferry.align.interpolate:Interpolate",
    "kv_projector": "kvferry.align.kv_projector:KVCacheProjector",
    "kv_projector_mlp": "kvferry.align.kv_projector_mlp:KVCacheProjectorMLP",
    "linear": "kvferry.align.linear:Linear",
    "low_rank": "kvferry.align.low_rank:LowRank",
    "map_projection": "kvferry.align.map_projection:MapProjectionAligner",
    "mean_only": "kvferry.align.mean_only:MeanOnly",
    "procrustes": "kvferry.align.procrustes:Procrustes",
    "random_map": "kvferry.align.random_map:RandomMap",
    "residual_mlp": "kvferry.align.residual_mlp:ResidualMLP",
    "token_table": "kvferry.align.token_table:TokenTable",
    "truncate": "kvferry.align.truncate:Truncate",
    "zero_pad": "kvferry.align.zero_pad:ZeroPad",
}
