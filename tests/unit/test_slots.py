"""Places on the device, on paper: budgets, leases, pins and who leaves first."""

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.adapters.slots import SlotTable
from sound import check_slots


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


def test_it_has_to_leave_also_where_a_pinned_one_is_idle() -> None:
    slots = table("pinned", "hot", slots=2)
    slots.pin("pinned", True)
    assert slots.lease("hot") is not None and slots.reserve("cold", 10) is None
    assert slots.lease("hot") is None and slots.lease("pinned") is not None


def test_the_bytes_of_an_idle_one_count_once() -> None:
    slots = SlotTable(budget_bytes=100, max_slots=10)
    for key, num_bytes in (("idle", 40), ("hot", 60)):
        assert slots.reserve(key, num_bytes) is not None
    slots.release("idle")
    assert slots.reserve("cold", 80) is None
    assert slots.lease("hot") is None, "40 bytes are not enough"


def test_no_more_have_to_leave_than_it_takes() -> None:
    slots = table("idle", "a", "b", budget=30)
    assert slots.lease("a") is not None and slots.lease("b") is not None
    assert slots.reserve("cold", 20) is None
    assert slots.lease("a") is None and slots.lease("b") is not None and slots.lease("idle") is not None


@pytest.mark.parametrize("gives_up", [True, False])
def test_those_that_were_to_leave_stay_where_nobody_waits_any_more(gives_up: bool) -> None:
    slots = table("a", "b", slots=2)
    assert slots.lease("a") is not None and slots.lease("b") is not None
    assert slots.reserve("c", 10) is None and slots.lease("a") is None
    if gives_up:
        slots.keep_all()
    else:  # another place became free
        slots.release("b")
        assert slots.reserve("c", 10) is not None
    assert slots.lease("a") is not None


def test_who_leases_a_place_may_share_it_though_it_is_to_leave() -> None:
    slots = table(slots=1)
    reserved = slots.reserve("a", 10)
    assert reserved is not None and slots.reserve("b", 10) is None
    assert slots.lease("a") is None and slots.share("a") == reserved[0] and slots.num_leases("a") == 2


def test_a_pin_ends_a_leave() -> None:
    slots = table("a", slots=1)
    assert slots.lease("a") is not None and slots.reserve("b", 10) is None
    slots.pin("a", True)
    assert slots.lease("a") is not None and not slots.fits(10)


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

    @rule(num_bytes=st.integers(1, 50))
    def wait(self, num_bytes: int) -> None:
        """It comes to its turn once those that are to leave have left, though nobody else goes."""
        trial = copy.deepcopy(self.slots)
        if trial.fits(num_bytes) and trial.reserve("new", num_bytes) is None:
            leaving = [key for key in self.leases if trial.lease(key) is None]
            for key in leaving:
                trial.release(key)
            assert trial.reserve("new", num_bytes) is not None

    @rule(key=st.sampled_from("abc"), is_pinned=st.booleans())
    def pin(self, key: str, is_pinned: bool) -> None:
        if key in self.slots:
            self.slots.pin(key, is_pinned)

    @invariant()
    def is_sound(self) -> None:
        check_slots(self.slots)

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
