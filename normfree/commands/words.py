"""What the verbs share: the error of a wrong command line, and the nearest word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The command line was not understood."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    # like `nearest` of models/layers.py, which would import torch
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
