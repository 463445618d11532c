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

from normfree.serve.limits import Limits, client_of
from normfree.serve.turns import AT_ONCE, MAX_PAUSE, SILENT_SECONDS, Turns
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
    # Behind a proxy, all clients are one.
    turns = Turns(AT_ONCE if limits.client_share < 1 else None)

    class Protocol(H11Protocol):
        """uvicorn's protocol, with time limits for incomplete requests and responses, limits of connections, and turns.

        While a request waits for its turn, nothing more is read from its connection.
        """

        _timer: asyncio.TimerHandle | None = None
        _silence: asyncio.TimerHandle | None = None  # runs while more of a request is expected
        _reader: asyncio.TimerHandle | None = None  # runs while the client does not read its response

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._opened, self._unread = self.loop.time(), 0
            self._of = client_of(self.client)
            self._at_work, self._began, self._early = False, 0.0, b""
            self._timer = self.loop.call_later(head_seconds, self._late)
            self._close_oldest()

        def data_received(self, data: bytes) -> None:
            if self._silence is not None:
                self._silence.cancel()
            if not self._at_work and not self._early:
                self._at_work, self._began = turns.enter(self._of, self._begin), self.loop.time()
            if not self._at_work or self._early:
                self._early += data
                self._cancel()
                self._unset_keepalive_if_required()
                self.flow.pause_reading()
                return
            self._read(data)

        def _begin(self) -> None:
            """Work on the request that has waited for its turn."""
            self._at_work, self._began = True, self.loop.time()
            self.loop.call_soon(self._read_early)

        def _read_early(self) -> None:
            data, self._early = self._early, b""
            if not self.transport.is_closing():
                self.flow.resume_reading()
                self._read(data)

        def _read(self, data: bytes) -> None:
            if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
                self._unread += len(data)
                if self._unread > _LINGER_BYTES:  # an endless body
                    self.transport.abort()
                    return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel()
            elif self._timer is None:
                self._timer = self.loop.call_later(head_seconds, self._late)
            cycle = self.cycle
            if self._at_work and cycle is not None and not cycle.more_body and self.conn.trailing_data[0]:
                cycle.keep_alive = (
                    False  # no turns for requests that were sent before the response to this one
                )
            self._end_turn_if_complete()
            if self._at_work and (self.cycle is None or self.cycle.more_body):
                self._silence = self.loop.call_later(SILENT_SECONDS, self._end_turn)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._end_turn_if_complete()

        def _end_turn_if_complete(self) -> None:
            """End the turn if the request was read and answered."""
            cycle = self.cycle
            if cycle is not None and cycle.response_complete and not cycle.more_body:
                self._end_turn()

        def _end_turn(self) -> None:
            """Let the next request of this client begin, after as long a pause: others get half of the time."""
            if self._at_work:
                self._at_work = False
                pause = min(self.loop.time() - self._began, MAX_PAUSE) if turns.waits(self._of) else 0.0
                self.loop.call_later(pause, turns.leave, self._of)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            turns.forget(self._of, self._begin)
            if self._silence is not None:
                self._silence.cancel()
            self._end_turn()
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
            # A connection that was closed is removed later.
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
