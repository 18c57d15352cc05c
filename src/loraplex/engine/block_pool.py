"""Which block holds the K/V of which tokens: reference counts, lookup by a hash chain, LRU eviction. Knows block ids
only; the tensors are in the model's K/V cache."""

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
    """Return one hash per full block: SHA-256 of (the hash of the block before, K/V identity, tokens).

    The identity is `prefix_kv_id` for a block that lies wholly before `activation`. For any other block it is `kv_id`
    and the number of the block's tokens before `activation`. known: hashes of the first blocks, which are kept.
    """
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
    """Blocks 0 ... num_blocks - 1. Each block is free, referenced, or cached.

    A cached block has no reference but is found by its hash, until it is evicted. The least recently used block is
    evicted first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._num_references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    def num_evictable(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` are cached without a reference, so that `allocate` can evict them."""
        return sum(block in self._cached for block in blocks)

    def match(self, hashes: Iterable[bytes]) -> tuple[int, ...]:
        """Return the blocks of the longest known prefix of a hash chain. The blocks are not acquired."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block. Each block must be referenced or cached already."""
        for block in blocks:
            self._num_references[block] = self._num_references.get(block, 0) + 1
            self._cached.pop(block, None)

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each block. An unreferenced block with a hash stays cached; any other becomes free.

        The end of a chain is evicted before its beginning, because it cannot be found without the beginning.
        """
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
        """Return `num_blocks` referenced blocks without a hash, evicting cached blocks if needed. Returns None where
        too few are available."""
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
        """Let a referenced block be found by `digest`; call it once the block's K/V is written. If another block has
        the same hash already, that block is kept."""
        assert block in self._num_references, f"block {block} is not referenced"
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest
