"""Removal of batch norm from existing networks."""
