"""From a prompt to text: compiled model, decoding, sampling, streaming, and inspection of a forward
pass. Knows nothing of runs.
"""
