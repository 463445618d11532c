"""Numbers about a network or a run, as tables and pictures."""
