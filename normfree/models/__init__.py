"""Networks: a table of variants, and the one skeleton that builds each of them."""
