"""normfree.tools."""
