"""CUDA kernels on a machine with a driver and torch's CUDA wheel: their machine code, loading, launching.

Nothing here is imported before a GPU is used, so a machine without one needs none of NVIDIA's packages.
"""
