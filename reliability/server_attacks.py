"""Attacks on the server of goal 10, each by one client with many connections."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from reliability.image_kinds import of_size, png

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSED = frozenset({400, 403, 404, 405, 408, 413, 415, 422, 429, 503})


class Counts(Protocol):
    """Numbers of responses by status; number 0 counts the requests and connections that were begun."""

    def __getitem__(self, index: int) -> int: ...
    def __setitem__(self, index: int, value: int) -> None: ...


class Attacker:
    """One of the threads of an attack.

    Args:
        port: of the server.
        address: of the attackers.
        rng: makes its requests.
        counts: where its requests are counted.
    """

    lock = threading.Lock()

    def __init__(self, port: int, address: str, rng: Random, counts: Counts) -> None:
        self.port, self.address, self.rng, self.counts = port, address, rng, counts

    def count(self, status: int = 0) -> None:
        """Count a request, or the status of a response."""
        with self.lock:
            self.counts[status] += 1

    def connect(self) -> socket.socket:
        """Return a connection."""
        return socket.create_connection(
            ("127.0.0.1", self.port), timeout=60, source_address=(self.address, 0)
        )

    def status(self, sock: socket.socket) -> None:
        """Read the head of a response and count its status, if there is one."""
        data = b""
        while b"\r\n" not in data and (more := sock.recv(65_536)):
            data += more
        if data[:9] == b"HTTP/1.1 ":
            self.count(int(data[9:12]))


Move = Callable[[Attacker], None]


@dataclass(frozen=True)
class Attack:
    """What one client does.

    Attributes:
        move: what each thread does again and again.
        statuses: the responses that it may get.
        threads: number of threads.
    """

    move: Move
    statuses: frozenset[int] = REFUSED
    threads: int = 8

    def run(self, port: int, address: str, seed: str, counts: Counts) -> None:
        """Attack until the process is killed."""
        os.nice(19)

        def repeat(number: int) -> None:
            attacker = Attacker(port, address, Random(f"{seed} {number}"), counts)
            while True:
                with contextlib.suppress(OSError):
                    self.move(attacker)

        for number in range(self.threads):
            threading.Thread(target=repeat, args=(number,)).start()


def request(body: bytes, head: bytes = HEAD) -> bytes:
    """Return a request with a body."""
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def asked(make: Callable[[Random], bytes]) -> Move:
    """Return a move that sends a request and waits for the response."""

    def move(attacker: Attacker) -> None:
        data = make(attacker.rng)
        with attacker.connect() as sock:
            attacker.count()
            sock.sendall(data)
            attacker.status(sock)

    return move


def left(make: Callable[[Random], bytes]) -> Move:
    """Return a move that sends a request and leaves without waiting for the response."""

    def move(attacker: Attacker) -> None:
        data = make(attacker.rng)
        with attacker.connect() as sock:
            attacker.count()
            sock.sendall(data)
        time.sleep(0.05)

    return move


def held(*starts: bytes, connections: int = 25) -> Move:
    """Return a move that opens connections, sends the start of a request on each, and then a byte each second."""

    def move(attacker: Attacker) -> None:
        with contextlib.ExitStack() as stack:
            sockets = []
            for _ in range(connections):
                with contextlib.suppress(OSError):
                    sockets.append(stack.enter_context(attacker.connect()))
                    sockets[-1].sendall(attacker.rng.choice(starts))
                attacker.count()
            for _ in range(10):
                time.sleep(1.0)
                for sock in sockets if any(starts) else ():
                    with contextlib.suppress(OSError):
                        sock.sendall(b"x")

    return move


def streamed(start: bytes, pieces: Callable[[], Any]) -> Move:
    """Return a move that sends pieces until the server closes the connection, without reading."""

    def move(attacker: Attacker) -> None:
        with attacker.connect() as sock:
            attacker.count()
            sock.sendall(start)
            for piece in pieces():
                sock.sendall(piece)

    return move


@functools.cache
def _image(width: int, height: int) -> bytes:
    return of_size(width, height)(Random(0))


def image(width: int, height: int) -> bytes:
    """Return an encoded image of this size."""
    with _MAKING:
        return _image(width, height)


_MAKING = threading.Lock()  # a large image is made once, not by many threads at the same time


def _form(rng: Random, files: int) -> bytes:
    """Return a form with many files, whose names are lines for a log."""
    name = b'--e\r\nContent-Disposition: form-data; name="file"; filename="a%0d%0aERROR fake\x1b[31m"\r\n\r\nx\r\n'
    head = HEAD.replace(b"image/png", b"multipart/form-data; boundary=e")
    return request(name * files + b"--e--\r\n", head)


def get(path: bytes) -> bytes:
    """Return a request without a body."""
    return b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"


PATHS = (
    b"/../../etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"//etc/passwd", b"/predict/..%2f..", b"/\\..\\", b"/%00",
    b"/a%0d%0aX-Evil:%201", b"/a%0a2026-01-01%2000:00:00,000%20ERROR%20fake", b"/" + b"a" * 8000, b"/a%1b[31mb",
)  # fmt: skip
HOSTS = (
    b"evil.example", b"localhost.evil.example", b"localhost\r\nOrigin: http://evil.example", b"[::1",
    b"localhost\r\nSec-Fetch-Site: cross-site", b"evil.example\x1b[31m",
)  # fmt: skip
BROKEN = (
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"POST /predict HTTP/x\r\n\r\n", HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", HEAD + b"Bad header\x00\r\n\r\n",
    CHUNKED + b"zz\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", HEAD + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
)  # fmt: skip
SMALL, OK = (300, 200), frozenset({200})
ATTACKS: dict[str, Attack] = {
    "200 idle connections": Attack(held(b"")),
    "200 slow heads": Attack(held(b"P", b"POST /predict HT", HEAD)),
    "200 slow bodies": Attack(held(HEAD + b"Content-Length: 5000\r\n\r\n", CHUNKED)),
    "64 images of 62 megapixels at once": Attack(
        asked(lambda rng: request(image(7900, 7900))), REFUSED | OK, 64
    ),
    "images of 15 megapixels": Attack(asked(lambda rng: request(image(3900, 3900))), REFUSED | OK),
    "large images of clients that leave": Attack(left(lambda rng: request(image(7900, 7900)))),
    "images of 400 megapixels": Attack(asked(lambda rng: request(png(20_000, 20_000, b"x")))),
    "flood of good requests": Attack(asked(lambda rng: request(image(*SMALL))), REFUSED | OK, 32),
    "flood of pages": Attack(asked(lambda rng: get(rng.choice((b"/", b"/health", b"/metrics")))), OK | {503}),
    "pipelined requests": Attack(streamed(b"", lambda: itertools.repeat(get(b"/health") * 50)), OK | {503}),
    "flood of noise": Attack(asked(lambda rng: request(rng.randbytes(2000)))),
    "endless bodies": Attack(
        streamed(CHUNKED, lambda: itertools.repeat(b"10000\r\n" + bytes(0x10000) + b"\r\n"))
    ),
    "tiny chunks without end": Attack(streamed(CHUNKED, lambda: itertools.repeat(b"1\r\nx\r\n" * 5000))),
    "forms of 200 files": Attack(asked(lambda rng: _form(rng, 200))),
    "hosts and origins of other sites": Attack(
        asked(lambda rng: request(image(*SMALL), HEAD.replace(b"localhost", rng.choice(HOSTS)))),
        frozenset({400, 403, 503}),
    ),
    "paths and lines for the log": Attack(
        asked(lambda rng: get(rng.choice(PATHS))), frozenset({400, 404, 503})
    ),
    "malformed HTTP": Attack(asked(lambda rng: rng.choice((*BROKEN, rng.randbytes(200) + b"\r\n\r\n")))),
}
