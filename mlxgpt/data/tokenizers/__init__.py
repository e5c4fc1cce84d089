"""Tokenizers: their interface, characters, byte-level BPE and its training, and reading any
tokenizer.json.
"""
