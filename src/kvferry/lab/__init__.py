"""The judge: arms side by side on the same items, with controls and paired statistics.

point    one measured result, the same JSON everywhere
items    twin questions, in batches
arms     what the sender sends: caches, texts, controls
peer     the receiver as a second process
latency  one item at a time, stage by stage
compare  which arms are compared, and the verdicts
demo     all of it, for one pair of models
verdict  the result in plain words
picture  accuracy against bytes
report   the table, the HTML page
ledger   results on disk
"""
