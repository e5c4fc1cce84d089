"""GPT-2 and its variants: the forward pass, KV cache, parameters, losses. Knows shapes and arrays;
nothing of texts, runs or training.
"""
