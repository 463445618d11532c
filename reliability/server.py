"""Goal 10: under attack from another address, the server answers good clients soon, and with bounded memory.

The server is `normfree serve` with its defaults and a small network. Attackers and good client have addresses of their
own. The attackers run with the lowest priority: in earnest they have processors of their own, here they share two.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from reliability.goals import Case, Result, spread
from reliability.image_kinds import pixels
from reliability.runs import CONTEXT, start_process
from reliability.server_attacks import ATTACKS, Counts

GOOD, BAD = "127.0.0.1", "127.0.0.2"  # on Linux, each is an address of its own
ROUNDS, REQUESTS = 5, 12  # of good requests, without and with an attack in turn
FACTOR = 2.0  # of the usual time of a good client
MEMORY = 1_500_000_000  # bytes that the server may take, PyTorch included
STOP_SECONDS = 8.0  # between SIGTERM and the end of the server
# A line of the log as `normfree serve` writes it.
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (WARNING|ERROR) [ -~]*")
WAITING = ("normfree_queue_length", "normfree_held_bytes", "normfree_waiting_pixels")


def cases(count: int) -> Iterator[Case]:
    """Return `count` of the attacks, and a check of the address."""
    yield Case("without an attack: listens on the loopback interface only", "loopback", loopback)
    names = list(ATTACKS)
    for index in spread(len(names), count):
        yield Case(names[index], names[index], partial(judged, names[index]))


# --- the server -------------------------------------------------------------------------------------------------


@cache
def _model() -> Path:
    """Return a folder with a small network."""
    from normfree.models.zoo import create_model
    from normfree.preprocessing import Preprocessing
    from normfree.pretrained import TrainedModel, save_pretrained

    _temporary.append(tempfile.TemporaryDirectory(prefix="normfree-server-"))
    net = create_model("nf_resnet_nano", num_classes=3).eval()
    model = TrainedModel(net, Preprocessing(64), ("cat", "dog", "newt"))
    return save_pretrained(model, Path(_temporary[-1].name) / "model")


_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _serve(folder: Path, model: Path) -> None:
    """Run `normfree serve`; its output goes to out.txt and log.txt, its temporary files to tmp."""
    from normfree.commands.serve_command import ServeArguments, serve

    for handle, name in ((1, "out.txt"), (2, "log.txt")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    sys.stdout, sys.stderr = (os.fdopen(handle, "w", buffering=1, encoding="utf-8") for handle in (1, 2))
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
    raise SystemExit(serve(ServeArguments(str(model), port=0, device="cpu")))


@dataclass
class Server:
    """A server in a process of its own."""

    folder: Path
    process: Any
    port: int

    @property
    def log(self) -> str:
        """What the server wrote to its log."""
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def memory(self) -> int:
        """Return the largest memory that the server has taken."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def waiting(self) -> float:
        """Return the sum of what waits in the server: images, bytes and pixels."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        client.request("GET", "/metrics")
        lines = client.getresponse().read().decode().splitlines()
        client.close()
        return sum(float(line.split()[1]) for line in lines if line.startswith(WAITING))


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """Run a server."""
    with tempfile.TemporaryDirectory(prefix="normfree-server-") as temporary:
        folder = Path(temporary)
        (folder / "tmp").mkdir()
        process = start_process(_serve, folder, _model())
        try:
            out, found = folder / "out.txt", None
            while found is None:
                assert process.is_alive(), (folder / "log.txt").read_text()
                time.sleep(0.02)
                found = re.search(r"http://127.0.0.1:(\d+)/", out.read_text() if out.exists() else "")
            yield Server(folder, process, int(found[1]))
        finally:
            process.kill()
            process.join()


# --- clients ----------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """What good clients got.

    Attributes:
        seconds: of each request.
        wrong: a line for each answer that is not the right one.
    """

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def good_requests(port: int, count: int, expected: str, into: Answers) -> str:
    """Send requests of one image, one after the other; add what happened to `into`; return the class of the last."""
    body, found = _photo(), ""
    for _ in range(count):
        start = time.monotonic()
        try:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(GOOD, 0))
            client.request("POST", "/predict?top=1", body, {"Content-Type": "image/jpeg"})
            response = client.getresponse()
            answer = response.read().decode()
            found = (
                json.loads(answer)["predictions"][0]["top"][0]["class"] if response.status == 200 else answer
            )
            client.close()
        except OSError as error:
            found = f"{type(error).__name__}: {error}"
        into.seconds.append(time.monotonic() - start)
        if expected and found != expected:
            into.wrong.append(found)
    return found


@cache
def _photo() -> bytes:
    """Return an image as a good client sends it."""
    out = io.BytesIO()
    pixels(Random(0), size=(63, 47)).resize((500, 375), Image.Resampling.BICUBIC).save(
        out, "JPEG", quality=90
    )
    return out.getvalue()


# --- one trial --------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """What happened in one trial.

    Attributes:
        usual: answers of good requests without the attack.
        attacked: answers of good requests during the attack.
        memory: largest number of bytes that the server has taken.
        counts: responses that the attackers got, by status.
        waiting: images, bytes and pixels that wait in the server after the attack.
        seconds: between SIGTERM during the attack and the end of the server.
        code: exit code of the server.
        log: what it wrote to its log.
        left: names of its temporary files.
    """

    usual: Answers = field(default_factory=Answers)
    attacked: Answers = field(default_factory=Answers)
    memory: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    waiting: float = 0.0
    seconds: float = 0.0
    code: int | None = None
    log: str = ""
    left: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median time of a good request during the attack, divided by the usual one."""
        return statistics.median(self.attacked.seconds) / statistics.median(self.usual.seconds)

    def complaints(self, statuses: frozenset[int]) -> list[str]:
        """Return what is wrong, times excepted; an attacker may get these statuses. There are `CHECKS` checks."""
        wrong = self.usual.wrong + self.attacked.wrong
        foreign = [line for line in self.log.splitlines() if not LINE.fullmatch(line)]
        others = {status: count for status, count in self.counts.items() if status not in statuses}
        checks = {
            f"{len(wrong)} good requests not answered: {wrong[:1]}": not wrong,
            f"the server took {self.memory / 1e6:.0f} MB": self.memory < MEMORY,
            f"attackers got {others}": not others,
            f"{self.waiting:g} still wait": not self.waiting,
            f"in the log: {foreign[:1]}": not foreign,
            f"exit code {self.code} after SIGTERM": self.code == 0,
            f"left: {self.left[:3]}": not self.left,
        }
        assert len(checks) == CHECKS
        return [text for text, right in checks.items() if not right]


CHECKS = 7


@contextlib.contextmanager
def under(name: str, port: int, seed: str, counts: Counts) -> Iterator[None]:
    """Attack a server meanwhile; the connections of the attackers break off at the end."""
    begun = counts[0]
    process = start_process(_attack, name, port, seed, counts)
    try:
        while counts[0] == begun:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.join()


def _attack(name: str, port: int, seed: str, counts: Counts) -> None:
    ATTACKS[name].run(port, BAD, seed, counts)


def attacked(name: str, *, rounds: int = ROUNDS, requests: int = REQUESTS) -> Trial:
    """Send good requests without and with an attack in turn, then SIGTERM during the attack."""
    trial, counts = Trial(), CONTEXT.RawArray("q", 600)
    with server() as running:
        expected = good_requests(running.port, 5, "", Answers())
        for number in range(rounds):
            good_requests(running.port, requests, expected, trial.usual)
            with under(name, running.port, f"{name} {number}", counts):
                good_requests(running.port, requests, expected, trial.attacked)
            # Not counted: the server still notices that the attackers have left.
            good_requests(running.port, 3, "", Answers())
        trial.memory = running.memory()
        deadline = time.monotonic() + 60
        while (waiting := running.waiting()) and time.monotonic() < deadline:
            time.sleep(0.1)
        trial.waiting = waiting
        with under(name, running.port, f"{name} end", counts):
            start = time.monotonic()
            os.kill(running.process.pid, signal.SIGTERM)
            running.process.join(60)
            trial.seconds, trial.code = time.monotonic() - start, running.process.exitcode
        trial.log = running.log
        trial.left = [path.name for path in (running.folder / "tmp").iterdir()]
    trial.counts = {status: counts[status] for status in range(100, 600) if counts[status]}
    return trial


def judged(name: str) -> Result:
    """Return the checks of one trial, those of times included."""
    trial = attacked(name)
    wrong = trial.complaints(ATTACKS[name].statuses)
    if trial.ratio > FACTOR:
        wrong.append(f"good clients waited longer than {FACTOR:g} times their usual time")
    if trial.seconds > STOP_SECONDS:
        wrong.append(f"SIGTERM took {trial.seconds:.1f} s")
    usual = 1000 * statistics.median(trial.usual.seconds)
    figures = f"{trial.ratio:.1f} times the usual {usual:.0f} ms, {trial.memory / 1e6:.0f} MB"
    figures += f", stopped in {trial.seconds:.1f} s"
    return Result(CHECKS + 2, CHECKS + 2 - len(wrong), "; ".join([*wrong, figures]))


def loopback() -> Result:
    """Check that a server answers at 127.0.0.1, and at no other address of this machine."""
    with server() as running:
        answered = bool(good_requests(running.port, 1, "", Answers()))
        try:
            socket.create_connection((BAD, running.port), timeout=10).close()
        except ConnectionRefusedError:
            return Result(1, int(answered))
    return Result(1, 0, f"answers at {BAD}")
