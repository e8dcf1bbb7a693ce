"""Measurements: each script prints a table and writes benchmarks/results/NAME.json with machine and commit."""
