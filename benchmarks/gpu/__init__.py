"""Benchmarks that need a GPU: `python -m benchmarks.gpu.NAME` writes benchmarks/results/gpu_NAME.json."""
