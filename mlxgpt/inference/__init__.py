"""Inference: text generation with a KV cache, sampling, scoring, and inspection of a forward pass.
Does not depend on runs.
"""
