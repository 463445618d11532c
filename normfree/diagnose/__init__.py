"""Statistics of a network or of a run, as numbers, tables and figures."""
