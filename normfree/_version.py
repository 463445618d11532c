"""The version, alone so that packaging and `normfree --version` read it without importing torch."""

__version__ = "0.1.0"
