"""What the verbs share: the error of a wrong command line, and the nearest word."""

from __future__ import annotations


class UsageError(ValueError):
    """The command line was not understood."""
