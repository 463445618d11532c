"""normfree.training."""
