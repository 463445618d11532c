"""normfree.training.distributed."""
