"""uvicorn's protocol, in which requests wait for the turn of their client before they are read."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from normfree.serve.limits import client_of
from normfree.serve.turns import MAX_PAUSE, SILENT_SECONDS, Turns

# Bytes that are parsed at once. A chunked body of single bytes takes h11 a second for 256 kB, the default of asyncio.
_READ_BYTES = 16_384
# Average bytes of a chunk, its head included, below which a body is not read to its end.
_CHUNK_BYTES = 16


class ProtocolInTurn(H11Protocol):
    """uvicorn's protocol. While a request waits for its turn, nothing more is read from its connection.

    Attributes:
        turns: of all connections of a server.
    """

    turns: Turns
    _silence: asyncio.TimerHandle | None = None  # runs while more of a request is expected

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self._of = client_of(self.client)
        self._at_work, self._began, self._early = False, 0.0, b""

    def data_received(self, data: bytes) -> None:
        if self._silence is not None:
            self._silence.cancel()
        if not self._at_work and not self._early:
            self._at_work, self._began = self.turns.enter(self._of, self._begin), self.loop.time()
        if self._at_work and not self._early:
            self._read(data)
        else:
            self._early += data
            self._hold()

    def _hold(self) -> None:
        """Read nothing more until the turn of this request has come."""
        self._unset_keepalive_if_required()
        self.flow.pause_reading()

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
        super().data_received(data)
        cycle = self.cycle
        if cycle is not None and cycle.more_body and len(data) == _READ_BYTES:  # at full speed
            tiny = 2 * len(data) < _CHUNK_BYTES * data.count(b"\r\n")  # two ends of lines in each chunk
            if tiny and (b"transfer-encoding", b"chunked") in self.headers:
                self.transport.abort()
                return
        if cycle is not None and {b"transfer-encoding", b"content-length"} <= {
            name for name, _ in self.headers
        }:
            cycle.keep_alive = False  # a proxy may have taken the other length (RFC 9112, section 6.1)
        if self._at_work and cycle is not None and not cycle.more_body and self.conn.trailing_data[0]:
            # Requests that were sent before the response to this one would need no turn.
            cycle.keep_alive = False
        self._end_turn_if_complete()
        if self._at_work and (cycle is None or cycle.more_body):
            self._silence = self.loop.call_later(SILENT_SECONDS, self._end_turn)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._end_turn_if_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.turns.forget(self._of, self._begin)
        if self._silence is not None:
            self._silence.cancel()
        self._end_turn()
        super().connection_lost(exc)

    def _end_turn_if_complete(self) -> None:
        """End the turn if the request was read and answered."""
        cycle = self.cycle
        if cycle is not None and cycle.response_complete and not cycle.more_body:
            self._end_turn()

    def _end_turn(self) -> None:
        """Let the next request of this client begin, after a pause as long as this one took: half of the time."""
        if self._at_work:
            self._at_work = False
            pause = min(self.loop.time() - self._began, MAX_PAUSE) if self.turns.waits(self._of) else 0.0
            self.loop.call_later(pause, self.turns.leave, self._of)
