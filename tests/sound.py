"""Invariants of the tables of blocks, slots and versions, whatever happened before."""

from typing import Any

from loraplex.adapters.residence import Residence
from loraplex.adapters.slots import SlotTable
from loraplex.engine.block_pool import BlockPool


def check_blocks(pool: BlockPool) -> None:
    """Every block is in exactly one of the three states, and the two indexes agree."""
    states = [set(pool._free), set(pool._num_references), set(pool._cached)]
    assert sum(map(len, states)) == pool.num_blocks, "a block is lost or counted twice"
    assert set.union(*states) == set(range(pool.num_blocks)), "a block is lost"
    assert len(pool._free) == len(states[0]), "a block is free twice"
    assert all(count > 0 for count in pool._num_references.values()), "a reference is counted below one"
    assert {digest: block for block, digest in pool._hash_of.items()} == pool._block_of, "the two indexes differ"
    assert not states[0] & set(pool._hash_of), "a free block can be found"
    assert states[2] <= set(pool._hash_of), "a cached block cannot be found"


def check_slots(slots: SlotTable) -> None:
    """Every slot is free or has one owner, and the budgets hold."""
    owned = [occupant.slot for occupant in slots._occupants.values()]
    assert len(set(owned)) == len(owned), "a slot has two owners"
    assert sorted(owned + slots._free) == list(range(slots._num_slots)), "a slot is lost"
    assert slots.num_bytes == sum(occupant.num_bytes for occupant in slots._occupants.values())
    assert slots.num_bytes <= slots.budget_bytes and len(owned) <= slots.max_slots


def is_pinned(slots: SlotTable, key: str) -> bool:
    return key in slots._occupants and slots._occupants[key].is_pinned


def check_residence(residence: Residence[Any]) -> None:
    """No version is being placed or leased, and the budgets hold."""
    check_slots(residence.slots)
    assert not residence._waiting, "a version is being placed"
    assert not residence._num_leases, "a version is leased"
    assert not any(residence.slots.num_leases(kv_id) for kv_id in residence._versions), "a slot is leased"
    assert residence.host.num_bytes <= residence.host.budget_bytes
