"""normfree.weights."""
