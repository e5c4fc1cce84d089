"""Data pipeline: sources, tokenizers, train/validation splits, token arrays and batches."""
