"""The adapters and bases that each backend serves. An adapter beyond that is refused at load."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.kinds import KINDS
from loraplex.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The adapters and bases that one backend serves.

    backend:      the options that choose it.
    adapters:     the kinds (`KINDS`) that it serves exactly, in any mix on one base, loaded and unloaded in any order.
    other_bases:  serves bases that are quantized, or whose attention cannot be packed.
    """

    backend: str
    adapters: frozenset[str]
    other_bases: bool

    def check(self, folder: Path, kinds: Set[str]) -> None:
        """Raises AdapterError where the backend would not serve an adapter of these kinds exactly."""
        for kind in KINDS:
            if kind in kinds - self.adapters:
                raise AdapterError(
                    folder, f"{KINDS[kind]} is not served by {self.backend}", remedy="serve it with --backend native"
                )


NATIVE = Capabilities(backend="--backend native", adapters=frozenset(KINDS), other_bases=False)
# PEFT 0.21's behaviour, found by tests/contract/test_adapter_kinds.py. What fails with several adapters on a model:
# bias: PEFT writes the bias into the base, so all other adapters compute with it. It refuses a second such adapter.
# other_embedding: the same, but without an error. tying: the second adapter's LoRA is not tied.
# tokens: an adapter without trainable tokens does not load after one with them.
# saved: fails for a layer on which another adapter has LoRA. score: needs another model class.
PEFT = Capabilities(
    backend="--backend peft", adapters=frozenset({"lora", "alora", "lora_bias", "embedding", "dora"}), other_bases=False
)
# PEFT refuses `adapter_names` with DoRA.
PEFT_MIXED = Capabilities(
    backend="--backend peft --peft-batching mixed", adapters=PEFT.adapters - {"dora"}, other_bases=False
)
# vLLM 0.32 refuses most other kinds by name. It would read LoRA on the output head, but pads and shards it by its own
# rules. Its score heads need the base to be loaded as a classifier, for all adapters.
VLLM = Capabilities(backend="--backend vllm", adapters=frozenset({"lora"}), other_bases=True)
