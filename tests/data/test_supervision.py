"""No wait for a batch is endless, dead workers are noticed and named, and no worker outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data import supervision
from normfree.data.loader import eval_batches
from normfree.data.source import ArraySource
from normfree.data.supervision import LoaderError, LoadingStopped
from normfree.data.transforms.evaluate import eval_transform

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there are fewer cores


class Blocking(ArraySource):
    """Sample 3 cannot be read until the file `gate` exists, like an image on a storage that does not answer."""

    def __init__(self, gate: Path) -> None:
        images = np.zeros((8, 8, 8, 3), np.uint8)
        super().__init__(images, [0] * 8, classes=["a"], names=[str(i) for i in range(8)])
        self.gate = gate

    def image(self, index: int, draw: int = 0) -> Image.Image:
        while index == 3 and not self.gate.exists():
            time.sleep(0.01)
        return super().image(index, draw)


def batches(source, **options):
    transform = eval_transform(image_size=8, crop="squash")
    return eval_batches(source, transform, batch_size=1, workers=2, **options)


def test_a_wait_for_a_batch_has_a_deadline(tmp_path):
    with pytest.raises(LoaderError) as error:
        list(batches(Blocking(tmp_path / "gate"), deadline=0.2))
    assert str(error.value) == (
        "no batch of images arrived in 0.2 seconds. Fix: check that the storage of the data answers, then resume."
    )


def test_a_wait_shorter_than_the_deadline_changes_nothing(tmp_path):
    """The loader's own time limit of one interval passes several times."""
    source, seen = Blocking(tmp_path / "gate"), []
    checks = []

    def stopped():
        checks.append(0)
        if len(checks) == 6:  # 4 batches have been asked for, so this one waits
            (tmp_path / "gate").touch()
        return False

    for batch in batches(source, stopped=stopped):
        seen += batch.names
    assert seen == list("01234567")
    assert len(checks) > 8


def test_a_wait_ends_when_the_caller_asks_to_stop(tmp_path):
    stop = threading.Event()
    stream = batches(Blocking(tmp_path / "gate"), stopped=stop.is_set)
    assert [next(stream).names for _ in range(3)] == [("0",), ("1",), ("2",)]
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(LoadingStopped):
        next(stream)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_dead_worker_is_an_error_that_names_the_cause(tmp_path, monkeypatch, number):
    """It is raised while a batch is awaited, not between any two instructions of the main thread."""
    iterators = []
    original = supervision.supervised
    monkeypatch.setattr(
        "normfree.data.loader.supervised", lambda b, **k: (iterators.append(b), original(b, **k))[1]
    )
    stream = batches(Blocking(tmp_path / "gate"))
    next(stream)
    for worker in iterators[0]._workers:
        os.kill(worker.pid, number)
    for worker in iterators[0]._workers:
        worker.join()
    sum(range(100))  # PyTorch's handler of SIGCHLD would raise here
    with pytest.raises(LoaderError) as error:
        list(stream)
    reason = "killed by SIGKILL" if number == signal.SIGKILL else "no space for a batch in /dev/shm"
    assert reason in str(error.value)
    assert "Fix: resume" in str(error.value)


def test_a_full_shared_memory_is_one_line(monkeypatch):
    def full(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the workers are forks
    source = ArraySource(np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, classes=["a"], names=list("abcd"))
    with pytest.raises(LoaderError) as error:
        list(batches(source, deadline=60.0))
    text = str(error.value)
    assert text.startswith("a process that loads images found no space for a batch in /dev/shm")
    assert text.endswith(
        "(192 bytes). Fix: resume with --input.workers 0, or make it larger (docker run --shm-size=2g)."
    )
    assert "\n" not in text


PARENT = """
import sys, numpy as np
from normfree.data.loader import eval_batches
from normfree.data.source import ArraySource
from normfree.data.supervision import begin_worker
from normfree.data.transforms.evaluate import eval_transform

class Stuck(ArraySource):
    def image(self, index, draw=0):
        if index == 3:
            import threading
            threading.Event().wait()  # no check of PyTorch is made while an image is read
        return super().image(index, draw)

source = Stuck(np.zeros((8, 8, 8, 3), np.uint8), [0] * 8, classes=["a"], names=list("abcdefgh"))
stream = eval_batches(source, eval_transform(image_size=8, crop="squash"), batch_size=1, workers=2)
next(stream)
print("ready", flush=True)
next(stream), next(stream), next(stream)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="the children of a process are found in /proc")
def test_no_worker_outlives_a_parent_that_is_killed():
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 600
    while any(Path("/proc", worker).exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "error", [EOFError("unexpected EOF"), BlockingIOError(11, "Resource temporarily unavailable")]
)
def test_workers_that_cannot_be_started_are_one_error(tmp_path, monkeypatch, error):
    begin, calls = multiprocessing.Process.start, []

    def start(process: multiprocessing.Process) -> None:
        calls.append(process)
        if len(calls) == 2:
            raise error
        begin(process)

    monkeypatch.setattr(multiprocessing.Process, "start", start)
    source = Blocking(tmp_path)
    with pytest.raises(LoaderError, match=r"cannot be started \(.*\)\. Fix: resume the run"):
        list(eval_batches(source, eval_transform(image_size=8), batch_size=2, workers=2))
    calls[0].kill()  # else it would end with this process
    calls[0].join()
