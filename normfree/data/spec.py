"""The grammar of data specifications such as "shards:train-{000..127}.tar,val=val-{00..07}.tar"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from normfree.suggest import did_you_mean, problem


def parse_spec(text: str, *, allowed: Sequence[str], named: bool = False) -> tuple[str, dict[str, str]]:
    """Parse "SCHEME:TARGET,option=value,..." and return (TARGET, options).

    Commas that are not followed by `option=` belong to TARGET.

    Args:
        text: The specification.
        allowed: Names of the options.
        named: If True, SCHEME itself names the data and options follow it: "SCHEME" or "SCHEME:option=value,...".

    Raises:
        ValueError: The target is empty, or an option is unknown, repeated or empty.

    >>> parse_spec("shards:a,b.tar,val=c.tar", allowed=["val"])
    ('a,b.tar', {'val': 'c.tar'})
    """
    scheme, colon, rest = text.partition(":")
    target, *parts = re.split(r",(?=\w+=)", rest)
    form = ", ".join(f"{option}=..." for option in allowed)
    if named:
        target, parts = "", [target, *parts] if colon else []
    elif not target:
        raise ValueError(
            problem(f"{text!r} names no data", allowed=f"{scheme}:PATH, then {form}", fix="add the path")
        )
    options: dict[str, str] = {}
    for part in parts:
        option, _, value = part.partition("=")
        if option not in allowed or option in options or not value:
            kind = "an unknown" if option not in allowed else "a second" if option in options else "an empty"
            raise ValueError(
                problem(f"{text!r} has {kind} option {option!r}", allowed=form)
                + did_you_mean(option, allowed)
            )
        options[option] = value
    return target, options


def is_yes(options: Mapping[str, str], option: str, default: bool = False) -> bool:
    """Return True if `option` is "yes" among `options`, and `default` if it is absent.

    Raises:
        ValueError: The value is neither "yes" nor "no".
    """
    value = options.get(option)
    if value not in (None, "yes", "no"):
        fix = "yes" if str(value).lower() in ("true", "1", "on", "y") else "no"
        raise ValueError(problem(f"{option}={value}", allowed="yes or no", fix=f"{option}={fix}"))
    return default if value is None else value == "yes"
