"""Goal 6: signals at random moments; ranks, workers and launchers that are killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from reliability.goals import Case, Result, spread
from reliability.operations import complaints
from reliability.runs import (
    FLAGS,
    PATIENCE,
    STOP_SIGNALS,
    differences,
    finish,
    scratch,
    train,
    uninterrupted,
)

WORKERS = (*FLAGS, "--input.workers", "1")
LONG = (*FLAGS, "--length", "60st", "--log.evaluate_every", "20st")
LAUNCHES = 10  # torchrun takes ten seconds for each
LIMIT = 30.0  # seconds in which a job must end after a rank was killed
_MARK = "NORMFREE_RELIABILITY"  # variable of the environment by which the processes of one launch are found
SAVED = "saved, exit code 128 + its number, no process is left, run resumes identical"
RANK = "a rank of torchrun killed with -9: the others end, exit code not 0, run resumes identical"
LAUNCHER = "torchrun killed with -9: no process is left, run resumes identical"
WORKER = "a process that loads images killed with -9: saved, one line, run resumes identical"


def cases(count: int) -> Iterator[Case]:
    """Return `count` moments for signals, and a tenth as many for each thing that is killed."""
    for seed in range(count):
        number = STOP_SIGNALS[seed % len(STOP_SIGNALS)]
        yield Case(f"{number.name}: {SAVED}", f"{number.name}, seed {seed}", partial(signaled, number, seed))
    for seed in spread(LAUNCHES, -(-count // 10)):
        yield Case(RANK, f"rank, seed {seed}", partial(launched, seed, kills="rank"))
        yield Case(LAUNCHER, f"launcher, seed {seed}", partial(launched, seed, kills="launcher"))
        yield Case(WORKER, f"worker, seed {seed}", partial(without_worker, seed))


def signaled(number: int, seed: int) -> Result:
    """Send a signal to a run at a random moment after it began to handle signals, then resume it."""
    rng = random.Random(seed)
    whole, seconds = uninterrupted(WORKERS)
    with scratch() as folder:
        out = Path(folder) / "run"
        while True:  # until the run still lives at the moment
            job = train(out, flags=WORKERS)
            delay = rng.uniform(0.0, seconds)
            if job.ready():
                time.sleep(delay)
            if job.kill(number):
                break
            job.wait()
        before = time.monotonic()
        codes = job.wait()
        took = time.monotonic() - before
        # At the very end, after the signals are the system's again, nothing is left to do.
        wrong = (
            []
            if codes in ([128 + number], [0], [-number])
            else [f"exit code {codes[0]}: {job.printed()[-300:]}"]
        )
        wrong += ["a traceback"] if "Traceback" in job.printed() else []
        wrong += ["ended by the system before the end"] if codes == [-number] and not finished(out) else []
        finish(out, flags=WORKERS)
        wrong += differences(whole, out)
    return Result(1, int(not wrong), "; ".join(wrong) or f"{took:.1f} s")


def finished(out: Path) -> bool:
    """Return True if the last checkpoint of a run and its results are written."""
    return (out / "results.json").exists() and (out / "model" / "README.md").exists()


def launched(seed: int, *, kills: str) -> Result:
    """Kill a rank or the launcher of a run of two processes after a random step, then resume the run."""
    rng = random.Random(seed)
    whole, _ = uninterrupted(LONG, ranks=2)
    with scratch() as folder:
        out, mark = Path(folder) / "run", f"{os.getpid()}-{kills}-{seed}"
        with (Path(folder) / "output.txt").open("wb") as output:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                 "-m", "normfree", "train", *LONG, "--out", str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: mark}, stdout=output, stderr=output,
            )  # fmt: skip
        _wait_for_step(out, rng.randrange(1, 50), launcher)
        victims = [launcher.pid] if kills == "launcher" else _children(launcher.pid)
        os.kill(rng.choice(victims), signal.SIGKILL)
        start = time.monotonic()
        code = launcher.wait(PATIENCE)
        while (alive := _marked(mark)) and time.monotonic() < start + PATIENCE:
            time.sleep(0.05)
        took = time.monotonic() - start
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        wrong = [f"{len(alive)} processes did not end"] if alive else []
        wrong += [f"ended after {took:.0f} s"] if took > LIMIT else []
        wrong += ["exit code 0"] if code == 0 else []
        finish(out, ranks=2)
        wrong += differences(whole, out)
    return Result(1, int(not wrong), "; ".join(wrong) or f"{took:.1f} s")


def without_worker(seed: int) -> Result:
    """Kill a process that loads images at a random moment, then resume the run."""
    rng = random.Random(seed)
    whole, seconds = uninterrupted(WORKERS)
    with scratch() as folder:
        out = Path(folder) / "run"
        while True:
            job = train(out, flags=WORKERS)
            main, end = job.processes[0].pid, time.monotonic() + rng.uniform(0.0, seconds)
            while not (others := [pid for pid in job.alive() if pid != main]) or time.monotonic() < end:
                if job.processes[0].exitcode is not None:
                    break
                time.sleep(0.001)
            if others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(others), signal.SIGKILL)
                break
            job.wait()
        wrong = complaints(job.wait()[0], job.printed(), killed=False)
        finish(out, flags=WORKERS)
        wrong += differences(whole, out)
    return Result(1, int(not wrong), "; ".join(wrong))


def _wait_for_step(out: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    """Wait until a run has written the line of `step` to metrics.jsonl.

    Raises:
        AssertionError: its launcher has ended before.
    """
    file = out / "metrics.jsonl"
    while not file.exists() or f'"step": {step},' not in file.read_text(encoding="utf-8"):
        assert launcher.poll() is None, f"exit code {launcher.returncode} before step {step}"
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started and that are alive."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in path.read_text(encoding="utf-8").split()]
    return found


def _marked(mark: str) -> list[int]:
    """Return the processes whose environment has the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # of others, or just ended
            if f"{_MARK}={mark}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found
