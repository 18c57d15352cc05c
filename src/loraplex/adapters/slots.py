"""Which adapter version has which slot of the device: a byte budget, leases, pins, least recently used first out.
Policy only; what a slot holds is the model's matter."""

from collections import OrderedDict
from dataclasses import dataclass

NO_ADAPTER = -1  # the slot of what runs on the bare base


def prefix_slot(slot: int) -> int:
    """The companion slot of an aLoRA adapter that also changes the tokens before its activation. What it saved and its
    biases hold there; its LoRA waits for the activation."""
    return -2 - slot


@dataclass(slots=True, eq=False)
class _Occupant:
    slot: int
    num_bytes: int
    num_leases: int = 0
    is_pinned: bool = False
    is_leaving: bool = False  # somebody waits for this slot: no new leases


class SlotTable:
    """Keys are adapter versions. A slot that is leased or pinned is not given to another.

    Where too many slots are leased, `reserve` chooses the versions used least recently to leave: they take no new
    leases, so that adapters in constant use cannot keep the others out for ever. One key at a time waits so: until it
    has its slot, or gives up by `keep_all`.
    """

    def __init__(self, *, budget_bytes: int, max_slots: int) -> None:
        self.budget_bytes = budget_bytes
        self.max_slots = max_slots
        self.num_bytes = 0
        self._occupants: OrderedDict[str, _Occupant] = OrderedDict()  # in order of last use
        self._free: list[int] = []
        self._num_slots = 0  # given out so far, counting those that are free again

    def __len__(self) -> int:
        return len(self._occupants)

    def __contains__(self, key: str) -> bool:
        return key in self._occupants

    def is_pinned(self, key: str) -> bool:
        return key in self._occupants and self._occupants[key].is_pinned

    def is_leaving(self, key: str) -> bool:
        """Whether somebody waits for its slot, so that it takes no new leases."""
        return key in self._occupants and self._occupants[key].is_leaving

    def fits(self, num_bytes: int) -> bool:
        """Whether there could ever be a slot for it, as things are pinned now."""
        pinned = [occupant for occupant in self._occupants.values() if occupant.is_pinned]
        return (
            len(pinned) < self.max_slots
            and sum(occupant.num_bytes for occupant in pinned) + num_bytes <= self.budget_bytes
        )

    def lease(self, key: str) -> int | None:
        """Its slot, which stays its own until `release`; None where it has no slot, or is to leave it."""
        occupant = self._occupants.get(key)
        if occupant is None or occupant.is_leaving:
            return None
        occupant.num_leases += 1
        self._occupants.move_to_end(key)
        return occupant.slot

    def share(self, key: str) -> int:
        """One more lease for somebody who holds one: also of a slot that is to be left."""
        occupant = self._occupants[key]
        assert occupant.num_leases > 0, f"nobody leases {key}"
        occupant.num_leases += 1
        return occupant.slot

    def release(self, key: str) -> None:
        occupant = self._occupants[key]
        assert occupant.num_leases > 0, f"{key} was released once too often"
        occupant.num_leases -= 1

    def num_leases(self, key: str) -> int:
        return self._occupants[key].num_leases if key in self._occupants else 0

    def pin(self, key: str, is_pinned: bool) -> None:
        occupant = self._occupants[key]
        occupant.is_pinned = is_pinned
        occupant.is_leaving = occupant.is_leaving and not is_pinned

    def reserve(self, key: str, num_bytes: int) -> tuple[int, list[tuple[str, int]]] | None:
        """A slot for `key`, leased once, and the (key, slot) pairs that have lost theirs for it. None: not now; try
        again after a release."""
        assert key not in self._occupants, f"{key} has a slot"
        idle = [
            (other, occupant)
            for other, occupant in self._occupants.items()
            if not occupant.num_leases and not occupant.is_pinned
        ]
        evicted: list[tuple[str, int]] = []
        num_slots, room = len(self._occupants), self.budget_bytes - self.num_bytes
        while num_slots >= self.max_slots or room < num_bytes:
            if len(evicted) == len(idle):
                self._make_leave(num_bytes)
                return None
            other, occupant = idle[len(evicted)]
            evicted.append((other, occupant.slot))
            num_slots, room = num_slots - 1, room + occupant.num_bytes
        for other, _ in evicted:
            self.drop(other)
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._num_slots = self._num_slots, self._num_slots + 1
        self._occupants[key] = _Occupant(slot, num_bytes, num_leases=1)
        self.num_bytes += num_bytes
        self.keep_all()
        return slot, evicted

    def keep_all(self) -> None:
        """Nobody waits any more: those that were to leave stay."""
        for occupant in self._occupants.values():
            occupant.is_leaving = False

    def drop(self, key: str) -> int:
        """Take its slot, which nobody leases, from a version; returns the slot."""
        occupant = self._occupants.pop(key)
        assert not occupant.num_leases, f"{key} is leased"
        self.num_bytes -= occupant.num_bytes
        self._free.append(occupant.slot)
        return occupant.slot

    def _make_leave(self, num_bytes: int) -> None:
        """Besides those that go already, choose enough of the leased ones that are used least recently."""
        num_slots, room = len(self._occupants), self.budget_bytes - self.num_bytes
        going = [occupant for occupant in self._occupants.values() if occupant.is_leaving or not occupant.num_leases]
        staying = [occupant for occupant in self._occupants.values() if occupant.num_leases and not occupant.is_leaving]
        for occupant in (*going, *staying):
            if num_slots < self.max_slots and room >= num_bytes:
                return
            if not occupant.is_pinned:
                occupant.is_leaving = occupant.num_leases > 0
                num_slots, room = num_slots - 1, room + occupant.num_bytes

    def check(self) -> None:
        """Assert that every slot is free or has one owner, and the budgets hold."""
        owned = [occupant.slot for occupant in self._occupants.values()]
        assert len(set(owned)) == len(owned), "a slot has two owners"
        assert sorted(owned + self._free) == list(range(self._num_slots)), "a slot is lost"
        assert self.num_bytes == sum(occupant.num_bytes for occupant in self._occupants.values())
        assert self.num_bytes <= self.budget_bytes and len(owned) <= self.max_slots
