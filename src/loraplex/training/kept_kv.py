"""Keeps the conversations' keys and values between the passes over the data."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

Ids = tuple[int, ...]
KV = dict[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> keys and values, [heads, length, head_dim] each


class KeptKV:
    """Computes a conversation's keys and values the first time that it comes, and keeps them where there is room.

    The base is frozen, and an activated adapter does not change the tokens before its activation: so these are the same
    in every pass over the data. Nothing is evicted: passes come in rounds, so what came last is wanted last.
    """

    def __init__(self, budget_bytes: int, compute: Callable[[Ids], KV]) -> None:
        """compute: returns the keys and values of one conversation. It is computed by itself, so that the very numbers
        do not depend on the batch in which it comes first."""
        self._left, self._compute = budget_bytes, compute
        self._kept: dict[Ids, KV] = {}

    def of(self, conversations: Seq[Ids]) -> list[KV]:
        """Return the keys and values of each conversation; none of an empty one."""
        found = {ids: self._one(ids) if ids else {} for ids in dict.fromkeys(conversations)}
        return [found[ids] for ids in conversations]

    def _one(self, ids: Ids) -> KV:
        if ids in self._kept:
            return self._kept[ids]
        found = self._compute(ids)
        size = sum(part.nbytes for pair in found.values() for part in pair)
        if size <= self._left:
            self._left -= size
            self._kept[ids] = found
        return found
