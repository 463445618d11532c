"""A queue that serves its clients in turn, so that one who sends much delays the others by one item only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items by client. Clients take turns; the items of one client stay in order.

    >>> queue = FairQueue()
    >>> for client, item in (("a", 1), ("a", 2), ("a", 3), ("b", 4)):
    ...     queue.append(client, item)
    >>> [queue.popleft() for _ in range(len(queue))]
    [1, 4, 2, 3]
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Item]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def append(self, client: str, item: Item) -> None:
        """Add an item of a client."""
        self._queues.setdefault(client, deque()).append(item)

    def popleft(self) -> Item:
        """Remove and return the next item.

        Raises:
            IndexError: the queue is empty.
        """
        if not self._queues:
            raise IndexError("the queue is empty")
        client = next(iter(self._queues))
        queue = self._queues.pop(client)
        item = queue.popleft()
        if queue:
            self._queues[client] = queue  # behind the others
        return item

    def count(self, client: str) -> int:
        """Return the number of items of a client."""
        return len(self._queues.get(client, ()))

    def first(self) -> list[Item]:
        """Return the first item of each client."""
        return [queue[0] for queue in self._queues.values()]

    def keep(self, wanted: Callable[[Item], bool]) -> None:
        """Remove all items that are not wanted."""
        kept = {client: deque(filter(wanted, queue)) for client, queue in self._queues.items()}
        self._queues = {client: queue for client, queue in kept.items() if queue}

    def clear(self) -> list[Item]:
        """Remove and return all items."""
        return [self.popleft() for _ in range(len(self))]
