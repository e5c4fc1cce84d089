"""How this machine computes: the operations and their execution, as far as they differ by device.
Knows arrays, not models or text.
"""
