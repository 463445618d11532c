"""normfree.data.sources.open."""
