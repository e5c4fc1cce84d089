"""Device-specific code: device, memory, operations, and differences between CPU, Metal and CUDA.
Independent of models and datasets.
"""
