"""Goal 12: a coverage-guided run of every parser that reads what a user gives: nothing but `ValueError` comes out.

    python -m reliability.fuzz NAME [RUNS]     fuzz one parser; inputs that are new go to runs/fuzz/NAME/

Needs atheris; without it, inputs are changed at random, without regard to what they reach.
"""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from reliability.goals import Case, Result
from reliability.parsers import PARSERS, accepts, inputs
from reliability.records import ROOT

THOUSAND = 1000
_CODE = ["normfree.data", "normfree.files", "normfree.training.config", "normfree.training.config_io",
         "normfree.training.choices", "normfree.training.checkpoint", "normfree.diagnose.metrics_file",
         "normfree.weights", "normfree.pretrained", "json", "tomllib", "csv", "tarfile", "zipfile"]  # fmt: skip


def cases(count: int) -> Iterator[Case]:
    """Return a case for each parser: `count` thousand inputs."""
    for name in PARSERS:
        yield Case(
            "fuzzed inputs of all parsers: accepted, or refused in one line",
            name,
            partial(fuzzed, name, count),
        )


def fuzzed(name: str, thousands: int) -> Result:
    """Fuzz one parser in another process."""
    runs = thousands * THOUSAND
    command = [sys.executable, "-W", "ignore", "-m", "reliability.fuzz", name, str(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False)
    return Result(
        runs, runs if done.returncode == 0 else 0, "" if done.returncode == 0 else done.stderr[-500:]
    )


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


def main(name: str, runs: int) -> None:
    """Fuzz one parser; an error ends the process."""
    if importlib.util.find_spec("atheris") is None:
        changed_at_random(name, runs)
        return
    import atheris

    starts = ROOT / "runs" / "fuzz" / name
    starts.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=_CODE):
        for number, data in enumerate(inputs(name)):
            (starts / f"seed-{number}").write_bytes(data)
            accepts(name, data)  # imports what it needs
    longest = max(4096, *(2 * path.stat().st_size for path in Path(starts).iterdir()))
    options = [f"-runs={runs}", f"-max_len={longest}", "-timeout=20", "-rss_limit_mb=3000", "-verbosity=0",
               f"-artifact_prefix={starts}/crash-"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(starts)], lambda data: accepts(name, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100 * THOUSAND)
