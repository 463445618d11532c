"""Goal 1: a fault at each single file operation of a run, which fails or at which the process is killed."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from reliability.faults import Fault, counted, new_counter
from reliability.goals import Case, Result
from reliability.runs import FLAGS, differences, finish, scratch, train, uninterrupted

# Short, with two evaluations, a best checkpoint, a rotation and an end.
FULL = 400  # more than it has operations
SHORT = (*FLAGS, "--length", "4st", "--log.evaluate_every", "2st", "--log.checkpoint_every", "1st")
CHECKS = {"is killed": "kill -9 at each file operation: run ends identical",
          "fails": "each file operation fails once: one line or none, run ends identical"}  # fmt: skip


def cases(count: int) -> Iterator[Case]:
    """Return the first `count` operations, for each fault; those after the end of the run check nothing."""
    for what, check in CHECKS.items():
        for at in range(count):
            yield Case(check, f"operation {at} {what}", partial(fault_at, at, what))
    yield Case("a run has no more file operations than are tried", "their number", covered)


@functools.cache
def operations_of_run() -> int:
    """Return how many file operations an uninterrupted run makes."""
    with scratch() as folder:
        counter, out = new_counter(Path(folder)), Path(folder) / "run"
        finish(out, flags=SHORT, prepare=Fault(out, counter))
        return counted(counter)


def covered() -> Result:
    """Check that the full count covers all operations of a run."""
    return Result(1, int(operations_of_run() <= FULL), f"{operations_of_run()} operations")


def fault_at(at: int, what: str, *, lasting: bool = False) -> Result:
    """Let the operation with index `at` fail in one run, mend the disk, continue the run, and compare it."""
    if at >= operations_of_run():
        return Result(0, 0)
    whole, _ = uninterrupted(SHORT)
    with scratch() as folder:
        counter, out = new_counter(Path(folder)), Path(folder) / "run"
        job = train(out, flags=SHORT, prepare=Fault(out, counter, at, what, lasting))
        code, printed = job.wait()[0], job.printed()
        if what == "folder vanishes":
            bring_back(out)
        wrong = complaints(code, printed, killed=what == "is killed")
        finish(out, flags=SHORT)
        wrong += differences(whole, out, older_checkpoints=what == "is killed")
        if counted(counter) <= at:
            wrong.append("the operation was not reached")
    return Result(1, int(not wrong), "; ".join(wrong))


def complaints(code: int, printed: str, *, killed: bool) -> list[str]:
    """Return what is wrong with the end of a run that had a fault."""
    if killed:
        return [] if code == -9 else [f"exit code {code}"]
    errors = [line for line in printed.splitlines() if line.startswith("normfree: ")]
    found = (
        [] if (code, len(errors)) in ((0, 0), (2, 1)) else [f"exit code {code}, {len(errors)} lines of error"]
    )
    return found + (["a traceback"] if "Traceback" in printed else [])


def bring_back(out: Path) -> None:
    """Put a folder back that has vanished, over what was made in its path since."""
    gone = out.with_name(f"{out.name}.gone")
    if gone.exists():
        shutil.rmtree(out, ignore_errors=True)
        gone.rename(out)
