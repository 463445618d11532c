"""normfree.data.spec."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def parse_word(text: str, *, allowed: Sequence[str], named: bool = False) -> tuple[str, dict[str, str]]:
    """ "SCHEME:TARGET,option=value,..." -> (TARGET, options). Commas that no `option=` follows belong to TARGET.

    With `named`, SCHEME says what is meant and options follow it: "SCHEME" or "SCHEME:option=value,...". Raises
    `ValueError` for an empty target, for an option that is not in `allowed`, and for one given twice or without value.
    """
    scheme, colon, rest = text.partition(":")
    target, *parts = re.split(r",(?=\w+=)", rest)
    form = ", ".join(f"{word}=..." for word in allowed)
    if named:
        target, parts = "", [target, *parts] if colon else []
    elif not target:
        raise ValueError(f"{text!r} names nothing. Allowed: {scheme}:PATH, then {form}. Fix: add the path")
    options: dict[str, str] = {}
    for part in parts:
        word, _, value = part.partition("=")
        if word not in allowed or word in options or not value:
            near = get_close_matches(word, allowed, n=1, cutoff=0.0)[0]
            wrong = "an unknown" if word not in allowed else "a second" if word in options else "an empty"
            raise ValueError(f"{text!r} has {wrong} {word!r}. Allowed: {form}. Did you mean {near + '='!r}?")
        options[word] = value
    return target, options


def is_yes(options: Mapping[str, str], word: str, default: bool = False) -> bool:
    """What `word`=yes or `word`=no says among the options of a data word; `default` where it is not said."""
    said = options.get(word)
    if said not in (None, "yes", "no"):
        fix = "yes" if str(said).lower() in ("true", "1", "on", "y") else "no"
        raise ValueError(f"{word}={said}. Allowed: yes or no. Fix: {word}={fix}")
    return default if said is None else said == "yes"
