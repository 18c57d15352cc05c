"""A cache of adapter weights in host memory. Does not know what the weights are."""

from collections import OrderedDict
from typing import Any


class HostTier:
    """Caches weights by their identity, up to `budget_bytes`. Evicts the least recently used first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes, self.num_bytes = budget_bytes, 0
        self._held: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str) -> Any | None:
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: str, weights: Any, num_bytes: int) -> None:
        """Cache the weights, and evict others where needed. Weights larger than the budget are not cached."""
        self.drop(key)
        if num_bytes > self.budget_bytes:
            return
        self._held[key] = (weights, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.budget_bytes:
            self.drop(next(iter(self._held)))

    def drop(self, key: str) -> None:
        _, num_bytes = self._held.pop(key, (None, 0))
        self.num_bytes -= num_bytes
