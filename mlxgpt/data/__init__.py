"""Text to token arrays and batches: sources, tokenizers, splits, preparation. Knows nothing of
models.
"""
