"""Counted checks that nothing is lost and nothing gets in: one module for each goal, run by `python -m reliability`."""
