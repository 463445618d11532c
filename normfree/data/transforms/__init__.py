"""normfree.data.transforms."""
