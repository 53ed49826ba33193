"""The bench of the wire: what codecs cost and what they spoil, ours and others, side by side in one process.

texts    real held-out text, as token ids
subject  a model, the caches of its messages, and what it says after them
attention what the suffix reads from the prefix
quality  how far a coded cache is from the clean one
coding   a batch of caches through a codec, and the exact bits
peers    what a user would pick instead
profiles of the models, fitted on calibration text
entries  everything that is measured
speed    end to end, beside memcpy
bench    all of it
curve    bits where a family crosses a quality
ratios   ours against the baselines, at their own quality
sheets   the result as plain cells; tables, plot and results write it
"""
