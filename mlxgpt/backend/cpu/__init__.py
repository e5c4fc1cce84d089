"""Code for the CPU only, most of it for Linux. Only `backend` imports it, and the package itself,
which loads BLAS before MLX.
"""
