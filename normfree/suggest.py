"""Suggestions for misspelled names, and error messages of three parts: what was given, what is allowed, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_HARMLESS = "\n\t\u200c\u200d"  # not printable for Python


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the string of `known` that is most similar to `name`, or None if none is similar.

    >>> closest("nfnet-f0", ["nfnet_f0", "nf_resnet50"])
    'nfnet_f0'
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence to append to an error message, or "" if no string of `known` is similar to `name`.

    >>> did_you_mean("trian", ["train", "eval"])
    " Did you mean 'train'?"
    """
    match = closest(name, known)
    return f" Did you mean {match!r}?" if match else ""


def some_names(names: Iterable[str], *, limit: int = 5) -> str:
    """Return the first `limit` of `names`, quoted and separated by commas, and the number of the remaining ones.

    >>> some_names(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    listed = list(names)
    text = ", ".join(repr(name) for name in listed[:limit])
    return f"{text} and {len(listed) - limit} more" if len(listed) > limit else text


def printable(text: str) -> str:
    r"""Return `text` with characters that could control a terminal, or are no valid Unicode, as escapes.

    Line breaks, tabs and the joiners of emoji and Indic scripts stay. Names of files may hold any character.

    >>> print(printable("a\x1b[31mb\udcff"))
    a\x1b[31mb\udcff
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in _HARMLESS else c.encode("unicode_escape").decode() for c in text
    )


def problem(given: str, *, allowed: str = "", fix: str = "") -> str:
    """Return an error message in three parts. The last two are optional.

    Args:
        given: what was given or found.
        allowed: what would be valid.
        fix: the nearest correction.

    >>> problem("decay is 2.0", allowed="0 to 1", fix="pass decay=0.99999, the published value")
    'decay is 2.0. Allowed: 0 to 1. Fix: pass decay=0.99999, the published value.'
    """
    parts = [given, f"Allowed: {allowed}" if allowed else "", f"Fix: {fix}" if fix else ""]
    return " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in parts if part)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the error message for a name that is not in `known`.

    >>> unknown("mode", "agx", ["agc", "norm"])
    "unknown mode 'agx'. Did you mean 'agc'? Allowed: 'agc', 'norm'."
    """
    listed = list(known)
    return f"unknown {kind} {name!r}.{did_you_mean(name, listed)} Allowed: {', '.join(map(repr, listed))}."
