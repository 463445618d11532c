"""Gradient clipping, the optimizer, weight averaging and schedules; works with any `nn.Module`."""
