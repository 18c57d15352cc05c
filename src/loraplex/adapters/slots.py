"""Which adapter version has which place on the device: a byte budget, leases, pins, least recently used first out.
Policy only; what a place holds is the model's matter."""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Place:
    slot: int
    num_bytes: int
    num_leases: int = 0
    is_pinned: bool = False
    is_leaving: bool = False  # somebody waits for this place: no new leases


class SlotTable:
    """Keys are adapter versions. A place that is leased or pinned is not given to another.

    Where too many places are leased, `reserve` chooses those used least recently to leave: they take no new leases, so
    that adapters in constant use cannot keep the others out for ever. One key at a time waits so: until it has its
    place, or gives up by `keep_all`.
    """

    def __init__(self, *, budget_bytes: int, max_slots: int) -> None:
        self.budget_bytes = budget_bytes
        self.max_slots = max_slots
        self.num_bytes = 0
        self._places: OrderedDict[str, _Place] = OrderedDict()  # in order of last use
        self._free: list[int] = []
        self._num_slots = 0  # given out so far, counting those that are free again

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def is_pinned(self, key: str) -> bool:
        return key in self._places and self._places[key].is_pinned

    def fits(self, num_bytes: int) -> bool:
        """Whether there could ever be a place for it, as things are pinned now."""
        pinned = [place for place in self._places.values() if place.is_pinned]
        return (
            len(pinned) < self.max_slots and sum(place.num_bytes for place in pinned) + num_bytes <= self.budget_bytes
        )

    def lease(self, key: str) -> int | None:
        """Its slot, which stays its own until `release`; None where it has no place, or is to leave it."""
        place = self._places.get(key)
        if place is None or place.is_leaving:
            return None
        place.num_leases += 1
        self._places.move_to_end(key)
        return place.slot

    def share(self, key: str) -> int:
        """One more lease for somebody who holds one: also of a place that is to leave."""
        place = self._places[key]
        assert place.num_leases > 0, f"nobody leases {key}"
        place.num_leases += 1
        return place.slot

    def release(self, key: str) -> None:
        place = self._places[key]
        assert place.num_leases > 0, f"{key} was released once too often"
        place.num_leases -= 1

    def num_leases(self, key: str) -> int:
        return self._places[key].num_leases if key in self._places else 0

    def pin(self, key: str, is_pinned: bool) -> None:
        place = self._places[key]
        place.is_pinned = is_pinned
        place.is_leaving = place.is_leaving and not is_pinned

    def reserve(self, key: str, num_bytes: int) -> tuple[int, list[tuple[str, int]]] | None:
        """A slot for `key`, leased once, and the (key, slot) pairs that have lost theirs for it. None: not now; try
        again after a release."""
        assert key not in self._places, f"{key} has a place"
        idle = [(other, place) for other, place in self._places.items() if not place.num_leases and not place.is_pinned]
        evicted: list[tuple[str, int]] = []
        num_slots, room = len(self._places), self.budget_bytes - self.num_bytes
        while num_slots >= self.max_slots or room < num_bytes:
            if len(evicted) == len(idle):
                self._make_leave(num_bytes)
                return None
            other, place = idle[len(evicted)]
            evicted.append((other, place.slot))
            num_slots, room = num_slots - 1, room + place.num_bytes
        for other, _ in evicted:
            self.drop(other)
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._num_slots = self._num_slots, self._num_slots + 1
        self._places[key] = _Place(slot, num_bytes, num_leases=1)
        self.num_bytes += num_bytes
        self.keep_all()
        return slot, evicted

    def keep_all(self) -> None:
        """Nobody waits any more: those that were to leave stay."""
        for place in self._places.values():
            place.is_leaving = False

    def drop(self, key: str) -> int:
        """Take a place that nobody leases from its adapter; returns the slot."""
        place = self._places.pop(key)
        assert not place.num_leases, f"{key} is leased"
        self.num_bytes -= place.num_bytes
        self._free.append(place.slot)
        return place.slot

    def _make_leave(self, num_bytes: int) -> None:
        """Besides those that go already, choose enough of the leased ones that are used least recently."""
        num_slots, room = len(self._places), self.budget_bytes - self.num_bytes
        going = [place for place in self._places.values() if place.is_leaving or not place.num_leases]
        staying = [place for place in self._places.values() if place.num_leases and not place.is_leaving]
        for place in (*going, *staying):
            if num_slots < self.max_slots and room >= num_bytes:
                return
            if not place.is_pinned:
                place.is_leaving = place.num_leases > 0
                num_slots, room = num_slots - 1, room + place.num_bytes

    def check(self) -> None:
        """Assert that every slot is free or has one owner, and the budgets hold."""
        owned = [place.slot for place in self._places.values()]
        assert len(set(owned)) == len(owned), "a slot has two owners"
        assert sorted(owned + self._free) == list(range(self._num_slots)), "a slot is lost"
        assert self.num_bytes == sum(place.num_bytes for place in self._places.values())
        assert self.num_bytes <= self.budget_bytes and len(owned) <= self.max_slots
