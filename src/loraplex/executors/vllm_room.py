"""The room for adapters that vLLM makes on the device at its start: how many, and of which rank. Imports no vLLM."""

import contextlib
from collections.abc import Sequence as Seq

from loraplex.adapters.peft_config import read_peft_config
from loraplex.bundle import AdapterSource
from loraplex.errors import LoraplexError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM takes for max_lora_rank
MOST_LORAS = 32  # adapters that vLLM keeps room for on the device by default


def num_loras(adapters: Seq[AdapterSource], max_adapters: int) -> int:
    """Return how many adapters vLLM makes room for, whether they are loaded or not."""
    return min(max_adapters, max(len(adapters), 1), MOST_LORAS)


def rank_for(adapters: Seq[AdapterSource]) -> int:
    """Return the largest rank that vLLM must make room for. Unreadable adapters are skipped here; they are reported
    when they are loaded."""
    ranks = [16]
    for source in adapters:
        with contextlib.suppress(LoraplexError):
            config = read_peft_config(source.path)
            ranks += [config.r, *(config.rank_pattern or {}).values()]
    return allowed_rank(max(ranks))


def allowed_rank(rank: int) -> int:
    """Return the least rank that vLLM takes for adapters of this rank."""
    return next((one for one in RANKS if one >= rank), RANKS[-1])
