"""Requests at work by client: while several clients ask, each has one at once."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable

# Requests of one client that are worked on at once while others ask. With 2, a client waited for more than twice its
# usual time while another one sent requests without end (`python -m reliability server`).
AT_ONCE = 1
# A request of which nothing arrives for so long loses its turn until more arrives, so that a slow upload does not delay
# other requests of its client.
SILENT_SECONDS = 0.1
# Seconds. A client that has more requests waiting pauses for as long as the last one took, but not longer.
MAX_PAUSE = 0.5
# Seconds in which a client counts as asking after its last request.
ASKING_SECONDS = 2.0


class Turns:
    """Which requests are worked on. A client that asks alone has no limit. Not safe for several threads at once.

    Args:
        at_once: requests of one client at once while others ask; None: no limit.
        clock: returns seconds.
    """

    def __init__(self, at_once: int | None = AT_ONCE, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_once, self._clock = at_once, clock
        self._working: Counter[str] = Counter()
        self._waiting: dict[str, deque[Callable[[], object]]] = {}
        self._asked: dict[str, float] = {}  # when each client asked last, the earliest first

    def enter(self, client: str, begin: Callable[[], object]) -> bool:
        """Begin a request of a client, or call `begin` when its turn has come; return True if it begins at once.

        Each request that has begun must `leave`, and `forget` removes one that waits.
        """
        self._asked.pop(client, None)
        self._asked[client] = self._clock()
        if self._may_begin(client):
            self._working[client] += 1
            return True
        self._waiting.setdefault(client, deque()).append(begin)
        return False

    def leave(self, client: str) -> None:
        """End a request of a client, and begin those of this client whose turn has come."""
        self._working[client] -= 1
        if not self._working[client]:
            del self._working[client]
        queue = self._waiting.get(client, deque())
        while queue and self._may_begin(client):
            self._working[client] += 1
            queue.popleft()()
        self._drop(client)

    def waits(self, client: str) -> bool:
        """Return True if a request of a client waits."""
        return client in self._waiting

    def forget(self, client: str, begin: Callable[[], object]) -> None:
        """Remove a request that waits, if it does."""
        queue = self._waiting.get(client, deque())
        if begin in queue:
            queue.remove(begin)
        self._drop(client)

    def _may_begin(self, client: str) -> bool:
        """Return True if one more request of a client can be worked on."""
        since = self._clock() - ASKING_SECONDS
        while self._asked and self._asked[first := next(iter(self._asked))] < since:
            del self._asked[first]
        alone = not self._asked.keys() - {client}
        return self._at_once is None or alone or self._working[client] < self._at_once

    def _drop(self, client: str) -> None:
        """Keep nothing of a client for which nothing waits."""
        if not self._waiting.get(client):
            self._waiting.pop(client, None)
