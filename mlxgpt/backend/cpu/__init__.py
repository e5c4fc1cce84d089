"""CPU-only code, mostly for Linux. Imported only by `backend`, and by `mlxgpt/__init__.py`, which
loads OpenBLAS before MLX.
"""
