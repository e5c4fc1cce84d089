"""From a prompt to a text: sampling, the cache, decoding. Knows a model and a tokenizer, nothing of
runs.
"""
