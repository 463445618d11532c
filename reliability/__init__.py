"""Counted checks that nothing is lost and nothing gets in: one module for each goal; `python -m reliability` runs all."""
