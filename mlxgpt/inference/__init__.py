"""From a prompt to a text: compiled model, decoding, sampling, streaming; and a look at what the
model computes. Knows a model and a tokenizer, nothing of runs.
"""
