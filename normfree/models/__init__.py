"""Networks: a table of variants and the one skeleton that builds every row of it."""
