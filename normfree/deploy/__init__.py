"""normfree.deploy."""
