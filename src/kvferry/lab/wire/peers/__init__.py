"""What a user would pick instead: one file per family, one line per peer in `table`.

peer        what a peer is
integers    plain integers with scales per group, alone and after centring
seed        the layouts of the first drafts: pickle + zstd, KVWire v1
containers  torch.save and safetensors in bfloat16
lossless    zipnn and blosc2 on bfloat16
caches      transformers' quantised caches, by optimum-quanto and hqq
kivi        channel-wise keys, token-wise values
turboquant  random rotation and the Gaussian's best levels
cachegen    one scale per layer and token, arithmetic coding by channel
table       all of them
"""
