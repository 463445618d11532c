"""normfree.ops."""
