"""GPT-2 and its variants: forward pass, KV cache, parameters and losses. Independent of datasets,
runs and training.
"""
