"""Tokenizers: character-level, byte-level BPE and its training, and loading tokenizer.json."""
