"""Which block holds the K/V of which tokens: reference counts, a hash chain to find them, LRU eviction. Ids only; the
tensors are the runner's."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

BLOCK_SIZE = 16  # tokens
BASE_KV = bytes(32)  # the identity of K/V that the bare base computes


def block_hashes(
    token_ids: Seq[int], activation: int, kv_id: bytes, known: Seq[bytes] = (), prefix_kv_id: bytes = BASE_KV
) -> list[bytes]:
    """One hash for each full block: SHA-256(the block before, K/V identity, tokens). The identity is `prefix_kv_id` for
    a block that lies wholly before `activation`; one that it cuts says where. `known`: hashes of the first blocks."""
    assert len(kv_id) == len(prefix_kv_id) == len(BASE_KV), "identities of different lengths could be confused"
    hashes = list(known)
    parent = hashes[-1] if hashes else b""
    for start in range(len(hashes) * BLOCK_SIZE, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        num_before = min(max(activation - start, 0), BLOCK_SIZE)
        identity = prefix_kv_id if num_before == BLOCK_SIZE else kv_id + bytes([num_before])
        tokens = array("q", token_ids[start : start + BLOCK_SIZE]).tobytes()
        parent = hashlib.sha256(parent + identity + tokens).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """Blocks 0 ... num_blocks - 1. A block is free, or referenced, or cached: findable by its hash though nobody
    references it, until it is evicted, the one not used for longest first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._num_references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced and findable, in order of last use
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give out."""
        return len(self._free) + len(self._cached)

    def num_evictable(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody references, so that `allocate` could evict them."""
        return sum(block in self._cached for block in blocks)

    def match(self, hashes: Iterable[bytes]) -> tuple[int, ...]:
        """The blocks of the longest known beginning of a chain; not acquired yet."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Reference blocks that are in use or cached."""
        for block in blocks:
            self._num_references[block] = self._num_references.get(block, 0) + 1
            self._cached.pop(block, None)

    def release(self, blocks: Iterable[int]) -> None:
        """Give references back. A block that can be found stays cached; the end of a chain is evicted before its
        beginning, without which it is of no use."""
        for block in reversed(tuple(blocks)):
            self._num_references[block] -= 1
            if self._num_references[block]:
                continue
            del self._num_references[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Referenced blocks that nobody can find yet, evicting cached ones; None where there are not so many."""
        if num_blocks > self.num_available:
            return None
        taken = []
        for _ in range(num_blocks):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
            self._num_references[block] = 1
            taken.append(block)
        return taken

    def register(self, block: int, digest: bytes) -> None:
        """Let a referenced block be found, now that its K/V is written. The first of two equal ones is kept."""
        assert block in self._num_references, f"block {block} is not referenced"
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def check(self) -> None:
        """Assert that every block is free, referenced or cached, and only one of them, and that the index is sound."""
        states = [set(self._free), set(self._num_references), set(self._cached)]
        assert sum(map(len, states)) == self.num_blocks, "a block is lost or counted twice"
        assert set.union(*states) == set(range(self.num_blocks)), "a block is lost"
        assert len(self._free) == len(states[0]), "a block is free twice"
        assert all(count > 0 for count in self._num_references.values()), "a reference is counted below one"
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of, "the index is torn"
        assert not states[0] & set(self._hash_of), "a free block can be found"
        assert states[2] <= set(self._hash_of), "a cached block cannot be found"
