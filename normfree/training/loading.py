"""How a run loads its images: the number of processes, and how long it waits for a batch."""

from __future__ import annotations

import os
from typing import NamedTuple

from normfree.data.supervision import DEADLINE
from normfree.training.config import Config
from normfree.training.config_values import workers_in

# "auto": more processes seldom help before the network is faster than four of them decode.
MOST = 4


class Loading(NamedTuple):
    """Processes that load images, 0 for none, and the seconds after which a wait for a batch ends the run."""

    workers: int
    deadline: float


def loading(config: Config) -> Loading:
    """Return how a run with this config loads images on this machine."""
    workers, deadline = workers_in(config.input.workers)
    return Loading(min(MOST, cores()) if workers is None else workers, deadline or DEADLINE)


def cores() -> int:
    """Return the number of cores that each of this machine's processes of a run can use, at least 1."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        usable = os.cpu_count() or 1
    return max(1, usable // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
