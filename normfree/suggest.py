"""Suggestions and the one form of error messages: what was given, what is allowed, the nearest fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the word of `known` most similar to `word`, or None if none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the word of `known` most similar to `word`, or "" if none is similar."""
    close = closest(word, known)
    return f" Did you mean {close!r}?" if close else ""


def some_names(names: Iterable[str], *, limit: int = 5) -> str:
    """Return the first `limit` of `names`, quoted and joined by commas, and how many more there are."""
    listed = list(names)
    text = ", ".join(repr(name) for name in listed[:limit])
    return f"{text} and {len(listed) - limit} more" if len(listed) > limit else text


def problem(given: str, *, allowed: str = "", fix: str = "") -> str:
    """Return an error message in three parts: "GIVEN. Allowed: ALLOWED. Fix: FIX."

    >>> problem("decay is 2.0", allowed="0 to 1", fix="pass decay=0.99999, the published value")
    'decay is 2.0. Allowed: 0 to 1. Fix: pass decay=0.99999, the published value.'
    """
    parts = [given, f"Allowed: {allowed}" if allowed else "", f"Fix: {fix}" if fix else ""]
    return " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in parts if part)


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """Return the message for a `word` that is none of `known`: "unknown model 'x'. Did you mean 'y'? Allowed: ..."

    >>> unknown("mode", "agx", ["agc", "norm"])
    "unknown mode 'agx'. Did you mean 'agc'? Allowed: 'agc', 'norm'."
    """
    listed = list(known)
    return f"unknown {what} {word!r}.{did_you_mean(word, listed)} Allowed: {', '.join(map(repr, listed))}."
