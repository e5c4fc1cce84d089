"""Text to token arrays: sources, tokenizers, preparation, and batches."""
