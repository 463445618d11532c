"""The goals, and what each module of a goal provides.

A module has one function, `cases(count)`, which yields `Case`s without doing any work. A case runs some checks and
returns how many it made and how many passed. Cases with the same `check` are added up to one line of the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """Result of one case.

    Attributes:
        wanted: number of checks that were made.
        passed: number of those that passed.
        detail: what went wrong; or numbers worth keeping, such as a slope.
    """

    wanted: int
    passed: int
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """A few checks that run together.

    Attributes:
        check: what is checked; one line of the table.
        name: names the case within its goal for all time, for example "seed 17". Results are kept under this name, and
            an interrupted command continues with the cases that have none.
        run: makes the checks. An exception counts as one check that failed.
    """

    check: str
    name: str
    run: Callable[[], Result]


@dataclass(frozen=True)
class Goal:
    """One line of `GOALS`.

    Attributes:
        number: of the goal; 0 for the mutations, which check the tests.
        title: what must be true.
        full: the count of `make reliability`, which `cases` interprets: runs, files, steps.
    """

    number: int
    title: str
    full: int

    def cases(self, name: str, count: int) -> Iterator[Case]:
        """Return the cases of the module `name`, at most as many as `count` asks for."""
        return importlib.import_module(f"reliability.{name}").cases(count)


# By the name of the module. Tests run the same cases with small counts.
GOALS = {
    "kill": Goal(1, "A run that is killed at any instant ends with the same bits", full=120),
    "operations": Goal(1, "A fault at any file operation of a run loses nothing", full=400),
    "resume": Goal(2, "A run resumes at every step with the same bits", full=38),
    "images": Goal(3, "Every image that cannot be used is named, and no other", full=22),
    "hostile": Goal(4, "Hostile files run nothing, touch nothing else, and are one line of error", full=100),
    "bits": Goal(5, "A flipped bit or a cut is noticed, or harmless", full=20),
    "signals": Goal(6, "A signal, or the end of another process, loses nothing and leaves nothing", full=100),
    "disk": Goal(7, "A disk that refuses costs no checkpoint", full=40),
    "finite": Goal(8, "NaN and Inf never reach what is stored", full=108),
    "memory": Goal(9, "Nothing grows", full=2),
    "server": Goal(10, "A server under attack answers its good clients", full=100),
    "golden": Goal(11, "Known losses, earlier formats, equal runs, no network", full=3),
    "properties": Goal(12, "Laws of parsers, files and numbers hold for any input", full=10),
    "fuzz": Goal(12, "Parsers take any bytes", full=10),
    "mutations": Goal(0, "The tests of the protections", full=100),
}


def spread(items: int, count: int) -> list[int]:
    """Return at most `count` of the numbers 0 to `items` - 1, spread evenly, the first and the last among them.

    >>> spread(10, 4), spread(3, 9)
    ([0, 3, 6, 9], [0, 1, 2])
    """
    if count >= items:
        return list(range(items))
    if count == 1:
        return [0]
    return sorted({round(i * (items - 1) / (count - 1)) for i in range(count)})
