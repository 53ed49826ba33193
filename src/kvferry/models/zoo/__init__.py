"""Tiny language models that ship with the package, and the worlds they were trained to read.

catalog     which models there are and where their folders lie
worlds      the seeded generator of contexts, questions and answers
kinds       the kinds of world, as data; `words` has their words, `draw` fills them in
evaluate    exact-match scores of a model
recipes     one frozen training recipe per model
tokenizers  the three tokenizers
batches     documents -> token batches with loss weights
start       recipe -> untrained model
train       recipe -> folder
card        folder -> README.md
"""
