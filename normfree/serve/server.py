"""The application on a socket: uvicorn with limits that it lacks, and a clean end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from normfree.serve.upload import Limits

_HEAD_BYTES = 16_384  # request line and headers; what common servers allow
_GRACE = 5  # seconds for open requests when the server stops


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one.

    Raises:
        ValueError: the address does not exist here, is taken, or may not be used.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port}. Allowed: 0 to 65535. Fix: --port 8000")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"host {host!r}: {error.strerror or error}. Fix: --host 127.0.0.1") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that has just been left is free
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        fix = "--host 127.0.0.1"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            fix = "another --port; 0 takes a free one"
        raise ValueError(
            f"{host} port {port} cannot be used: {error.strerror or error}. Fix: {fix}"
        ) from None
    return sock


def make_server(app: FastAPI, *, limits: Limits | None = None) -> Server:
    """A uvicorn server for `app`; `run` it, or await its `serve`, with the socket of `listen`."""
    limits = limits or Limits()
    head_seconds = limits.head_seconds

    class Protocol(H11Protocol):
        """uvicorn's own, which waits for ever for a request that never comes whole."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._timer = self.loop.call_later(head_seconds, self._late)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel()
            elif self._timer is None:
                self._timer = self.loop.call_later(head_seconds, self._late)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _cancel(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Server(
        Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.max_connections + 1,  # uvicorn counts the connection that asks
            timeout_graceful_shutdown=_GRACE,
            h11_max_incomplete_event_size=_HEAD_BYTES,
        )
    )


def run(server: Server, sock: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, answers what is open, and returns."""
    with _quiet_end():
        server.run(sockets=[sock])


@contextmanager
def _quiet_end() -> Iterator[None]:
    # uvicorn raises the signal once more when it is done, which would end the process as if it had failed
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
