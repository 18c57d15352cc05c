"""A conversation is computed once where there is room for its keys and values."""

import torch

from loraplex.training.kept_kv import KV, Ids, KeptKV

SIZE = 2 * 2 * 3 * 4  # bytes of one token's keys and values


class Base:
    def __init__(self) -> None:
        self.computed: list[Ids] = []

    def __call__(self, ids: Ids) -> KV:
        self.computed.append(ids)
        return {0: (torch.full((2, len(ids), 3), float(ids[0])), torch.full((2, len(ids), 3), -float(ids[0])))}


def test_each_conversation_is_computed_once() -> None:
    base = Base()
    kept = KeptKV(10**6, base)
    first = kept.of([(1, 2), (3,), (1, 2)])
    again = kept.of([(3,), (1, 2)])
    assert base.computed == [(1, 2), (3,)]
    assert first[0] is first[2] is again[1] and first[1] is again[0]
    assert again[1][0][0].tolist() == [[[1.0] * 3] * 2] * 2


def test_what_has_no_room_is_computed_again_and_evicts_nothing() -> None:
    base = Base()
    kept = KeptKV(3 * SIZE, base)
    for _ in range(2):
        kept.of([(1, 1), (2, 2), (3,)])
    assert base.computed == [(1, 1), (2, 2), (3,), (2, 2)]


def test_an_empty_conversation_is_not_computed() -> None:
    base = Base()
    assert KeptKV(0, base).of([(), ()]) == [{}, {}] and base.computed == []
