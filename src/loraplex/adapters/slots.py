"""Decides which adapter version has which slot of the device, by a byte budget, leases, pins and last use. Policy only:
does not know what a slot holds."""

from collections import OrderedDict
from dataclasses import dataclass

NO_ADAPTER = -1  # the slot of tokens that run on the bare base


def prefix_slot(slot: int) -> int:
    """Return the companion slot of an aLoRA adapter that also changes the tokens before its activation.

    The companion slot holds the adapter's saved modules, biases and token rows, but not its LoRA."""
    return -2 - slot


@dataclass(slots=True, eq=False)
class _Occupant:
    slot: int
    num_bytes: int
    num_leases: int = 0
    is_pinned: bool = False
    is_leaving: bool = False  # to be evicted for a waiting version: takes no new leases


class SlotTable:
    """Slots by key; a key identifies a version's weights. A leased or pinned slot is never given to another key.

    Where too many slots are leased, `reserve` marks the least recently used keys as leaving. A leaving key takes no new
    leases, so that adapters in constant use cannot keep the others out for ever. Only one key at a time may wait like
    this: until it has a slot, or until `keep_all` ends the wait.
    """

    def __init__(self, *, budget_bytes: int, max_slots: int) -> None:
        self.budget_bytes = budget_bytes
        self.max_slots = max_slots
        self.num_bytes = 0
        self._occupants: OrderedDict[str, _Occupant] = OrderedDict()  # least recently used first
        self._free: list[int] = []
        self._num_slots = 0  # all slots so far, in use or free

    def __len__(self) -> int:
        return len(self._occupants)

    def __contains__(self, key: str) -> bool:
        return key in self._occupants

    def fits(self, num_bytes: int) -> bool:
        """Return whether `num_bytes` could get a slot at all, with the present pins."""
        pinned = [occupant for occupant in self._occupants.values() if occupant.is_pinned]
        return (
            len(pinned) < self.max_slots
            and sum(occupant.num_bytes for occupant in pinned) + num_bytes <= self.budget_bytes
        )

    def lease(self, key: str) -> int | None:
        """Lease the key's slot until `release`, and return it. None where the key has no slot, or is leaving it."""
        occupant = self._occupants.get(key)
        if occupant is None or occupant.is_leaving:
            return None
        occupant.num_leases += 1
        self._occupants.move_to_end(key)
        return occupant.slot

    def share(self, key: str) -> int:
        """Add a lease to a slot that is leased already, and return the slot. A leaving key may be shared, too."""
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
        """Return a slot for `key`, leased once, and the (key, slot) pairs that were evicted for it.

        None where there is no room now: try again after a release."""
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
        """End the wait for a slot: leaving keys stay."""
        for occupant in self._occupants.values():
            occupant.is_leaving = False

    def drop(self, key: str) -> int:
        """Take the slot from a key, and return it. The slot must not be leased."""
        occupant = self._occupants.pop(key)
        assert not occupant.num_leases, f"{key} is leased"
        self.num_bytes -= occupant.num_bytes
        self._free.append(occupant.slot)
        return occupant.slot

    def _make_leave(self, num_bytes: int) -> None:
        """Mark leased keys as leaving, least recently used first, until they and the idle keys make enough room."""
        num_slots, room = len(self._occupants), self.budget_bytes - self.num_bytes
        going = [occupant for occupant in self._occupants.values() if occupant.is_leaving or not occupant.num_leases]
        staying = [occupant for occupant in self._occupants.values() if occupant.num_leases and not occupant.is_leaving]
        for occupant in (*going, *staying):
            if num_slots < self.max_slots and room >= num_bytes:
                return
            if not occupant.is_pinned:
                occupant.is_leaving = occupant.num_leases > 0
                num_slots, room = num_slots - 1, room + occupant.num_bytes
