"""Places on the device, on paper: budgets, leases, pins and who leaves first."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.adapters.slots import SlotTable


def table(*keys: str, budget: int = 100, slots: int = 10, num_bytes: int = 10) -> SlotTable:
    found = SlotTable(budget_bytes=budget, max_slots=slots)
    for key in keys:
        assert found.reserve(key, num_bytes) is not None
        found.release(key)
    return found


def test_the_least_recently_used_leaves_first() -> None:
    slots = table("a", "b", "c", slots=3)
    assert slots.lease("a") is not None
    slots.release("a")
    reserved = slots.reserve("d", 10)
    assert reserved is not None and reserved[1] == [("b", 1)] and reserved[0] == 1


def test_as_many_leave_as_bytes_are_needed() -> None:
    slots = table("a", "b", "c", budget=30)
    reserved = slots.reserve("d", 15)
    assert reserved is not None and [key for key, _ in reserved[1]] == ["a", "b"]


def test_a_leased_or_pinned_place_is_kept() -> None:
    slots = table("a", "b", slots=2)
    slots.pin("a", True)
    slots.lease("b")
    assert slots.reserve("c", 10) is None
    slots.release("b")
    reserved = slots.reserve("c", 10)
    assert reserved is not None and reserved[1] == [("b", 1)]


def test_one_in_constant_use_has_to_leave_for_one_that_waits() -> None:
    slots = table("hot", slots=1)
    assert slots.lease("hot") is not None
    assert slots.reserve("cold", 10) is None
    assert slots.lease("hot") is None, "it would never become free"
    slots.release("hot")
    assert slots.reserve("cold", 10) is not None


def test_what_can_never_fit_is_known() -> None:
    slots = table("a", budget=30)
    assert slots.fits(30) and not slots.fits(31)
    slots.pin("a", True)
    assert slots.fits(20) and not slots.fits(21)
    full = table("a", "b", slots=2)
    full.pin("a", True)
    full.pin("b", True)
    assert not full.fits(1)


class Traffic(RuleBasedStateMachine):
    """Leases, pins and evictions in any order; whoever waits gets a place once everything is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotTable(budget_bytes=50, max_slots=4)
        self.leases: list[str] = []
        self.owner: dict[int, str] = {}

    @rule(key=st.sampled_from("abcdefgh"), num_bytes=st.integers(1, 30))
    def use(self, key: str, num_bytes: int) -> None:
        slot = self.slots.lease(key)
        if slot is None and key not in self.slots and self.slots.fits(num_bytes):
            reserved = self.slots.reserve(key, num_bytes)
            if reserved is not None:
                slot, evicted = reserved
                for other, lost in evicted:
                    assert other not in self.leases
                    assert self.owner.pop(lost) == other
                assert slot not in self.owner
                self.owner[slot] = key
        if slot is not None:
            assert self.owner[slot] == key
            self.leases.append(key)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        key = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.slots.release(key)

    @rule(key=st.sampled_from("abc"), is_pinned=st.booleans())
    def pin(self, key: str, is_pinned: bool) -> None:
        if key in self.slots:
            self.slots.pin(key, is_pinned)

    @invariant()
    def is_sound(self) -> None:
        self.slots.check()

    def teardown(self) -> None:
        for key in self.leases:
            self.slots.release(key)
        for key in "abc":
            if key in self.slots:
                self.slots.pin(key, False)
        if "new" not in self.slots:
            assert self.slots.reserve("new", 50) is not None


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
