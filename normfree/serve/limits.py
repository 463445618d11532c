"""The limits of a server, and the budgets that its clients share: no client can use up one alone."""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass, fields

from normfree.suggest import problem


@dataclass(frozen=True)
class Limits:
    """The limits of one server.

    Attributes:
        max_bytes: bytes of one request's body.
        max_pixels: pixels of one image, according to its header.
        max_waiting_pixels: pixels of all images of one lane together that wait to be decoded or are being decoded;
            see `normfree.serve.decoding.LANES`.
        max_files: files of one request.
        max_queue: images that wait for the network.
        max_connections: open connections; a further one closes the oldest that waits for its client, or gets
            status 503.
        max_held_bytes: bytes of all bodies that are being read or decoded; further requests are answered with 503.
        client_share: part of waiting pixels, queue, connections and held bytes that one client may use, by its
            address; further requests of this client are answered with 429. One request is always allowed. 1 if all
            clients have the address of a proxy.
        body_seconds: seconds in which a body must arrive, and in which a client must take a part of its response.
        head_seconds: seconds in which a request line and its headers must arrive, and also the unread rest of a
            rejected body.

    Raises:
        ValueError: a limit is not above 0, `client_share` is above 1, or a request of `max_files` would not fit in the
            queue.
    """

    max_bytes: int = 32_000_000
    max_pixels: int = 64_000_000  # a thread that decodes takes 256 MB for so many
    max_waiting_pixels: int = 256_000_000
    max_files: int = 16
    max_queue: int = 128
    max_connections: int = 128
    max_held_bytes: int = 256_000_000
    client_share: float = 0.5
    body_seconds: float = 60.0
    head_seconds: float = 10.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not value > 0:
                raise ValueError(
                    problem(f"{item.name} is {value}", allowed="above 0", fix=f"{item.name}={item.default}")
                )
        if self.client_share > 1:
            raise ValueError(
                problem(
                    f"client_share is {self.client_share}", allowed="above 0, at most 1", fix="client_share=1"
                )
            )
        if self.max_files > self.max_queue:
            raise ValueError(
                problem(f"max_files is {self.max_files}", allowed=f"at most max_queue, which is {self.max_queue}",
                        fix=f"max_files={self.max_queue}")
            )  # fmt: skip

    def share(self, limit: int, *, request: int) -> int:
        """Return what one client may use of `limit`: its share, but at least what one `request` needs."""
        return max(int(self.client_share * limit), request)


class RequestError(Exception):
    """A request that is rejected.

    Attributes:
        status: the HTTP status.
        reason: the reason, in one line.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class Budget:
    """An amount that clients share. Not safe for several threads at once.

    Args:
        limit: amount of all clients together.
        each: amount of one client. A client that has nothing may take more in one call.
        what: of which there would be too many, for errors.

    Attributes:
        used: amount that all clients have now.
    """

    def __init__(self, limit: int, *, each: int, what: str) -> None:
        self.limit, self.each, self.what, self.used = limit, each, what, 0
        self._taken: Counter[str] = Counter()

    def take(self, client: str, amount: int) -> None:
        """Take `amount` for a client.

        Raises:
            RequestError: 429 if this client has too much, 503 if all clients have; nothing was taken.
        """
        own = self._taken[client]
        if own and own + amount > self.each:
            raise RequestError(429, f"too many {self.what} of one client")
        if self.used + amount > self.limit:
            raise RequestError(503, f"too many {self.what}")
        self.used += amount
        self._taken[client] += amount

    def give_back(self, client: str, amount: int) -> None:
        """Give back what a client has taken."""
        self.used -= amount
        self._taken[client] -= amount
        if not self._taken[client]:
            del self._taken[client]


def client_of(address: tuple[str, int] | None) -> str:
    """Return what counts as one client: an IPv4 address, or the network of an IPv6 address, of which a host has many.

    >>> client_of(("192.0.2.7", 40000)), client_of(("2001:db8::1:2", 40000)), client_of(("::ffff:192.0.2.7", 40000))
    ('192.0.2.7', '2001:db8::/64', '192.0.2.7')
    """
    if address is None:
        return ""
    try:
        host = ipaddress.ip_address(address[0].partition("%")[0])
    except ValueError:
        return address[0]
    if isinstance(host, ipaddress.IPv4Address):
        return str(host)
    if host.ipv4_mapped is not None:
        return str(host.ipv4_mapped)
    return str(ipaddress.ip_network((host, 64), strict=False))
