"""Goal 12: a coverage-guided run of every parser that reads what a user gives: nothing but `ValueError` comes out.

Needs atheris (`pip install normfree[fuzz]`). `changed_at_random` needs nothing: it changes inputs without regard to
what they reach, for the tests.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from normfree.suggest import needs
from reliability.goals import Case, Result
from reliability.parsers import PARSERS, accepts, inputs
from reliability.records import ROOT

PART = 20_000  # inputs of one case
_EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")


def cases(count: int) -> Iterator[Case]:
    """Return `count` cases for each parser. Each continues from what the ones before have found."""
    for part in range(1, count + 1):
        for name in PARSERS:
            check = f"{name}: accepted, or refused in one line, within 20 seconds and 3 GB"
            yield Case(check, f"{name} {part}", partial(fuzzed, name, part))


def fuzzed(name: str, part: int) -> Result:
    """Fuzz one parser in another process."""
    with needs("a coverage-guided run", install="normfree[fuzz]"):
        import atheris  # noqa: F401
    command = [sys.executable, "-W", "ignore", "-m", "reliability.guided", name, str(PART), str(part)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=7200, check=False)
    executed = _EXECUTED.search(done.stderr)
    if done.returncode or executed is None:
        return Result(PART, 0, " ".join(done.stderr[-500:].split()))
    return Result(PART, min(PART, int(executed[1])))


def changed(data: bytes, rng: random.Random) -> bytes:
    """Return an input with a few random changes."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(5):
            case 0:
                made[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del made[at : at + rng.choice((1, 2, 8, 100))]
            case 2:
                made[at:at] = made[: rng.randrange(1, 40)]
            case 3:
                made[at:at] = rng.choice(
                    (b"9" * 30, b"-1", b"0", b"[", b'"', b"{", b"\0", b"=", b",", b"nan", b"\n")
                )
            case _:
                made[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\x7f"))
    return bytes(made)


def changed_at_random(name: str, runs: int, seed: int = 0) -> int:
    """Give a parser inputs that are changed at random; return how many it accepted."""
    rng, starts, accepted = random.Random(f"{name} {seed}"), inputs(name), 0
    for _ in range(runs):
        accepted += accepts(name, changed(rng.choice(starts), rng))
    return accepted
