"""How this machine computes: device, memory, operations, and what differs between CPU, Metal and
CUDA. Knows arrays, not models or text.
"""
