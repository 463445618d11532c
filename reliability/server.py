"""Goal 10: under attack from another address, the server answers good clients soon, and with bounded memory.

The server is `normfree serve` with its defaults. The attackers have another address than the good client, and the lowest
priority, because attackers in earnest use processors of their own.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from reliability.goals import Case, Result
from PIL import Image
from reliability.image_kinds import pixels
from reliability.runs import CONTEXT, PATIENCE
from reliability.server_attacks import ATTACKS, Counts

GOOD, BAD = "127.0.0.1", "127.0.0.2"  # on Linux, each is an address of its own
ROUNDS, REQUESTS = 3, 10  # of good requests, without and with an attack in turn
FACTOR = 2.0  # of the usual time of a good client
MEMORY = 1_500_000_000  # bytes that the server may take, PyTorch included
STOP_SECONDS = 8.0  # between SIGTERM and the end of the server
# A line of the log as `normfree serve` writes it, or one of the traceback of an error.
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (WARNING|ERROR) [ -~]*")
WAITING = ("normfree_queue_length", "normfree_held_bytes", "normfree_waiting_pixels")


def cases(count: int) -> Iterator[Case]:
    """Return `count` trials of each attack, and one of the address."""
    yield Case("listens on the loopback interface only, unless told otherwise", "loopback", loopback)
    for seed in range(count):
        for name in ATTACKS:
            yield Case(name, f"{name} {seed}", partial(attacked, name, seed))


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
    sys.stdout, sys.stderr = (open(handle, "w", buffering=1, encoding="utf-8") for handle in (1, 2))
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
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
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
        process = CONTEXT.Process(target=_serve, args=(folder, _model()))
        process.start()
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
            found = json.loads(answer)["predictions"][0]["top"][0]["class"] if response.status == 200 else answer
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
    pixels(Random(0), size=(63, 47)).resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


@contextlib.contextmanager
def under(name: str, port: int, seed: int, counts: Counts) -> Iterator[None]:
    """Attack a server meanwhile; the connections of the attackers break off at the end."""
    counts[0] = 0
    process = CONTEXT.Process(target=ATTACKS_run, args=(name, port, f"{name} {seed}", counts))
    process.start()
    try:
        while not counts[0]:  # until the attack has begun
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.join()


def ATTACKS_run(name, port, seed, counts):
    ATTACKS[name].run(port, BAD, seed, counts)


def trial(name, seed, rounds=ROUNDS, requests=REQUESTS):
    counts = CONTEXT.RawArray("q", 600)
    usual, attacked = Answers(), Answers()
    sent = 0; took = 0.0
    with server() as s:
        expected = good_requests(s.port, 5, "", Answers())
        for r in range(rounds):
            good_requests(s.port, 2, "", Answers())
            good_requests(s.port, requests, expected, usual)
            with under(name, s.port, seed * 100 + r, counts):
                t=time.monotonic(); n0=counts[0]
                good_requests(s.port, requests, expected, attacked)
                sent += counts[0]-n0; took += time.monotonic()-t
            time.sleep(0.3)
        mem = s.memory()
        w = s.waiting()
        log = s.log
    st = {i: counts[i] for i in range(1,600) if counts[i]}
    u, a = statistics.median(usual.seconds), statistics.median(attacked.seconds)
    print(f"{name:40s} {a/u:5.1f}x usual {u*1000:5.1f} ms attacked {a*1000:6.1f} max {max(attacked.seconds)*1000:6.0f} wrong {len(attacked.wrong)}+{len(usual.wrong)} {mem/1e6:.0f} MB sent {sent/took:.0f}/s waiting {w} {st} log {len(log)}", flush=True)
    for x in set(attacked.wrong): print("    ", x[:100])


if __name__ == "__main__":
    for name in ATTACKS:
        if len(sys.argv) < 2 or any(a in name for a in sys.argv[1:]):
            from reliability.server import trial as t
            t(name, 0)
