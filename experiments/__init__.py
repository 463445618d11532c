"""Experiments behind the measured results: each module writes one page of `experiments/results/`."""
