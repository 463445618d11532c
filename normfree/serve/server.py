"""Serve the application on a socket: uvicorn with additional limits and a clean shutdown."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from normfree.serve.limits import Limits
from normfree.serve.protocol_in_turn import ProtocolInTurn
from normfree.serve.turns import AT_ONCE, Turns
from normfree.suggest import problem

# Bytes of request line and headers, as common servers allow.
_HEAD_BYTES = 16_384
# Seconds in which open requests are answered when the server stops.
SHUTDOWN_SECONDS = 3
# Bytes of a body that are read after its rejection, so that the client gets to see the response.
_LINGER_BYTES = 8_000_000


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Port 0 means any free port.

    Raises:
        ValueError: the address does not exist on this machine, is in use, or is not permitted.
    """
    if not 0 <= port <= 65535:
        raise ValueError(problem(f"port is {port}", allowed="0 to 65535", fix="--port 8000"))
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(problem(f"host {host!r}: {reason}", fix="--host 127.0.0.1")) from None
    try:
        # A port that another process has just closed can be used at once. On Windows that is so without the option,
        # which would let two processes use one port.
        if os.name != "nt":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        fix = "--host 127.0.0.1"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            fix = "choose another --port, or 0 for any free port"
        reason = error.strerror or error
        raise ValueError(problem(f"{host} port {port} cannot be used: {reason}", fix=fix)) from None
    return sock


def make_server(
    app: FastAPI, *, limits: Limits | None = None, shutdown_seconds: float = SHUTDOWN_SECONDS
) -> Server:
    """Return a uvicorn server for `app`. Pass it to `run`, or await its `serve`, with the socket of `listen`.

    Open requests are answered for `shutdown_seconds` when it stops, and then canceled.
    """
    limits = limits or Limits()
    return Server(
        Config(
            app,
            http=_protocol(limits),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            # uvicorn counts the new connection as well.
            limit_concurrency=limits.max_connections + 1,
            timeout_graceful_shutdown=shutdown_seconds,  # type: ignore[arg-type]
            h11_max_incomplete_event_size=_HEAD_BYTES,
        )
    )


def _protocol(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's protocol with the limits of connections."""
    head_seconds, max_connections = limits.head_seconds, limits.max_connections
    max_each = limits.share(max_connections, request=1)
    shared = Turns(AT_ONCE if limits.client_share < 1 else None)  # behind a proxy, all clients are one

    class Protocol(ProtocolInTurn):
        """uvicorn's protocol with time limits for incomplete requests and responses, and limits of connections."""

        turns = shared
        _timer: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None  # runs while the client does not read its response

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._opened, self._unread = self.loop.time(), 0
            self._timer = self.loop.call_later(head_seconds, self._late)
            self._close_oldest()

        def _hold(self) -> None:
            super()._hold()
            self._cancel()

        def _read(self, data: bytes) -> None:
            if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
                self._unread += len(data)
                if self._unread > _LINGER_BYTES:  # an endless body
                    self.transport.abort()
                    return
            super()._read(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel()
            elif self._timer is None:
                self._timer = self.loop.call_later(head_seconds, self._late)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader = self.loop.call_later(limits.body_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reader is not None:
                self._reader.cancel()

        def _close_oldest(self) -> None:
            """Over a limit, close the oldest connections that wait for their clients: idle, or not yet complete.

            A connection over the limit of its client is closed itself if all others of that client are at work.
            """
            live = [c for c in self.connections if isinstance(c, Protocol) and not c.transport.is_closing()]
            own = [c for c in live if c._of == self._of]
            for among, most in ((own, max_each), (live, max_connections)):
                idle = [c for c in among if c.cycle is None or c.cycle.response_complete or c.cycle.more_body]
                waiting = sorted((c for c in idle if c is not self), key=lambda c: c._opened)
                for connection in waiting[: max(0, len(among) - most)]:
                    connection.transport.abort()
                if among is own and len(own) > most and not waiting:
                    self.transport.abort()

        def _cancel(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Protocol


def run(server: Server, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, answer open requests, and return."""
    with _ignored_signals():
        server.run(sockets=[sock])


@contextmanager
def _ignored_signals() -> Iterator[None]:
    """Ignore the signal that uvicorn raises again after its shutdown.

    It would end the process as if it had failed.
    """
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
