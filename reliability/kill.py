"""Goal 1: kill -9 at random instants of training, saving, evaluating, rotating and ending."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from reliability.goals import Case, Result
from reliability.runs import differences, finish, scratch, train, uninterrupted

KILLS = 3  # of each run
# Every sixth run has two processes, and one of its processes dies a little earlier than the other.
TWO, GAP = 6, 0.2


def cases(count: int) -> Iterator[Case]:
    """Return `count` runs, each killed `KILLS` times."""
    for seed in range(count):
        ranks = 2 if seed % TWO == TWO - 1 else 1
        check = (
            f"kill -9 at a random instant, {('one process', 'two processes')[ranks - 1]}: run ends identical"
        )
        yield Case(check, f"seed {seed}", partial(killed_run, seed, ranks))


def killed_run(seed: int, ranks: int) -> Result:
    """Kill a run `KILLS` times at instants that are uniform over its time, then let it end, and compare it."""
    rng = random.Random(seed)
    whole, seconds = uninterrupted(ranks=ranks)
    with scratch() as folder:
        out, kills = Path(folder) / "run", 0
        while kills < KILLS:
            job = train(out, ranks=ranks)
            time.sleep(rng.uniform(0.0, seconds))
            first = rng.randrange(ranks)
            kills += job.kill(rank=first)
            if ranks > 1:
                time.sleep(rng.uniform(0.0, GAP))
                job.kill(rank=1 - first)
            job.wait()
        finish(out, ranks=ranks)
        wrong = differences(whole, out)
    return Result(kills, 0 if wrong else kills, ", ".join(wrong))
