"""What we run on: the device and its memory, and what MLX needs on Linux and on a Mac to be quick
and undisturbed. Knows nothing of models.
"""
