"""Benchmarks against timm and others, side by side in one process: `python -m benchmarks.run`."""
