"""Small runs of `normfree train` in processes of their own, which checks may kill, and the comparison of run folders.

The processes are forked from a server that has imported everything, so that one run takes about a second. Linux only.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from normfree.diagnose.metrics_file import read_metrics
from reliability.faults import library

# Eight steps with shuffling, augmentation, mixing and averaging; in between checkpoints and evaluations.
FLAGS = tuple(
    shlex.split(
        "--data synthetic:classes=3,size=16,train=24,val=9 --model nf_resnet_nano --input.image_size 16 --device cpu "
        "--input.batch_size 8 --input.workers 0 --length 8st --optim.warmup 2st --log.every 1 --optim.ema_decay 0.5 "
        "--log.evaluate_every 3st --log.checkpoint_every 2st --augment.randaugment tv:2x9 --augment.mixup 0.2 "
        "--net.drop_rate 0.2 --precision float32"
    )
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Files that differ between two equal runs: times, and checksums of files with times.
_TIMED = ("log.txt", ".lock", "MANIFEST.json", "curves.png")
# Seconds after which a process that should have ended by itself counts as one that hangs.
PATIENCE = 600.0

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["normfree.training.loop", "normfree.cli", "torchvision.transforms.v2", "reliability.runs"]
)  # fmt: skip


@functools.cache
def _start_server() -> None:
    """Start the server with the library of faults.py loaded, which does nothing until a process arms it."""
    before = os.environ.get("LD_PRELOAD")
    if (path := library()) is not None:
        os.environ["LD_PRELOAD"] = str(path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("LD_PRELOAD", None)
        if before is not None:
            os.environ["LD_PRELOAD"] = before


def start_process(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Call a function, which must be picklable, in a new process of the server; return the process."""
    _start_server()
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


class Job:
    """One run of the command in one or several processes.

    Args:
        arguments: of `normfree`.
        output: file to which the processes append what they print.
        ranks: number of processes; without torchrun, which would import everything again.
        prepare: called in each process before the command, for example to inject a fault. Must be picklable.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        output: Path,
        ranks: int = 1,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.output = output
        port = free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port}  # fmt: skip
            environment = {k: str(v) for k, v in world.items()} if ranks > 1 else {}
            self.processes.append(start_process(_run, list(arguments), output, environment, prepare))

    def kill(self, number: int = signal.SIGKILL, rank: int = 0) -> bool:
        """Send a signal to one process; return False if it has ended before."""
        process = self.processes[rank]
        if process.exitcode is not None:
            return False
        assert process.pid is not None
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:  # it has ended meanwhile
            return False
        return True

    def ready(self) -> bool:
        """Wait until the command handles signals; return False if it has ended before."""
        pid = self.processes[0].pid
        while self.processes[0].exitcode is None:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            if int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1:
                return True
            time.sleep(0.001)
        return False

    def wait(self) -> list[int]:
        """Wait for the ends of all processes and of all that they have started; return the exit codes.

        Raises:
            AssertionError: some have not ended after PATIENCE; they are killed.
        """
        end = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        while (alive := self.alive()) and time.monotonic() < end:
            time.sleep(0.01)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        assert not alive, f"{len(alive)} processes did not end"
        return [process.exitcode or 0 for process in self.processes]

    def alive(self) -> list[int]:
        """Return the processes of this job that are alive, those that its processes have started included."""
        groups = {process.pid for process in self.processes}
        return [pid for pid, group in _groups() if group in groups]

    def printed(self) -> str:
        """Return what the processes of this and earlier jobs with the same file have printed."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""


def _run(arguments: list[str], output: Path, environment: dict[str, str], prepare: Any) -> None:
    """Run the command in this process, which becomes a group of its own."""
    import torch

    from normfree.cli import main
    from normfree.training import run_folder

    os.setpgid(0, 0)
    os.environ.update(environment)
    for number in STOP_SIGNALS:  # a background job would ignore some
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with output.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    # A plot takes as long as all the rest. This one makes the same file operations.
    run_folder.draw_curves = lambda rows, path, **_: path.write_bytes(b"plot")
    if prepare is not None:
        prepare()
    sys.exit(main(arguments))


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder, in memory if there is enough: what a killed process has written is there as well."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = 0
    return tempfile.TemporaryDirectory(
        prefix="normfree-reliability-", dir="/dev/shm" if free > 2**31 else None
    )


def train(out: Path, *, flags: Sequence[str] = FLAGS, **options: Any) -> Job:
    """Start a run in `out`, or continue it."""
    known = (out / "config.toml").exists()
    arguments = ["train", str(out)] if known else ["train", *flags, "--out", str(out)]
    return Job(arguments, output=out.with_name("output.txt"), **options)


def finish(out: Path, **options: Any) -> None:
    """Continue the run in `out` to its end.

    Raises:
        AssertionError: it did not end with exit code 0.
    """
    job = train(out, **options)
    codes = job.wait()
    assert not any(codes), f"exit codes {codes}: {job.printed()[-500:]}"


@functools.cache
def uninterrupted(flags: tuple[str, ...] = FLAGS, ranks: int = 1) -> tuple[Path, float]:
    """Return the folder of a run that nothing interrupts, and its seconds; it is made once for each process."""
    _temporary.append(scratch())
    out = Path(_temporary[-1].name) / "run"
    Job(["--version"], output=out.with_name("output.txt")).wait()  # the server imports, which is not timed
    start = time.monotonic()
    finish(out, flags=flags, ranks=ranks)
    return out, time.monotonic() - start


_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def differences(one: Path, other: Path, *, older_checkpoints: bool = True) -> list[str]:
    """Return the files in which two finished runs differ, apart from times.

    Args:
        older_checkpoints: compare all checkpoints; else only those that `last` and `best` name, since a disk that
            refuses one of the others does not end a run, and a stop at another step leaves one more.
    """
    files = [{p.relative_to(out) for p in out.rglob("*") if p.is_file()} for out in (one, other)]
    if not older_checkpoints:
        kept = {(one / "checkpoints" / name).read_text(encoding="utf-8").strip() for name in ("last", "best")}
        files = [
            {p for p in found if p.parent.name in kept or not p.parent.name.startswith("step-")}
            for found in files
        ]
    found = [f"{path}: only in one" for path in sorted(files[0] ^ files[1])]
    for path in sorted(files[0] & files[1]):
        if path.name in _TIMED:
            continue
        contents = [_timeless(out / path) for out in (one, other)]
        if contents[0] != contents[1]:
            found.append(f"{path}: differs")
    return found


def _timeless(file: Path) -> Any:
    """Return the content of a file without times and what depends on them."""
    if file.name == "metrics.jsonl":
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in read_metrics(file)]
    if file.name == "state.json":
        state = json.loads(file.read_text(encoding="utf-8"))
        state["meter"].pop("seconds")
        return {k: v for k, v in state.items() if k != "metrics"}
    return file.read_bytes()


def _groups() -> list[tuple[int, int]]:
    """Return (process, its group) of all processes except those that have ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = (
                path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            )
        except (OSError, ValueError):  # it has just ended
            continue
        if state not in "ZX":
            found.append((int(path.parent.name), int(group)))
    return found


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
