"""What each backend can do. An adapter beyond that is refused at load. The table is shown in docs/backends.md."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.kinds import KINDS
from loraplex.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one backend can do.

    backend:         the options that choose it.
    adapters:        the kinds (`KINDS`) that it serves exactly, in any mix on one base, loaded and unloaded in any
                     order.
    mixes_adapters:  several adapters run in one forward pass.
    shares_prefix:   tokens that sequences have in common are computed once.
    keeps_kv:        K/V is kept from one call to the next.
    cuts_prompts:    long prompts run in chunks, and other sequences are answered in between.
    generates:       text of several tokens, with sampling, logit bias and top log probabilities.
    other_bases:     serves bases that are quantized, or whose attention cannot be packed.
    """

    backend: str
    adapters: frozenset[str]
    mixes_adapters: bool
    shares_prefix: bool
    keeps_kv: bool
    cuts_prompts: bool
    generates: bool
    other_bases: bool

    def check(self, folder: Path, kinds: Set[str]) -> None:
        """Raises AdapterError where the backend would not serve an adapter of these kinds exactly."""
        for kind in KINDS:
            if kind in kinds - self.adapters:
                raise AdapterError(
                    folder, f"{KINDS[kind]} is not served by {self.backend}", remedy="serve it with --backend native"
                )


NATIVE = Capabilities(
    backend="--backend native",
    adapters=frozenset(KINDS),
    mixes_adapters=True,
    shares_prefix=True,
    keeps_kv=True,
    cuts_prompts=True,
    generates=True,
    other_bases=False,
)
# PEFT 0.21's behaviour, found by tests/contract/test_adapter_kinds.py. What fails with several adapters on a model:
# bias: PEFT writes the bias into the base, so all other adapters compute with it. It refuses a second such adapter.
# other_embedding: the same, but without an error. tying: the second adapter's LoRA is not tied.
# tokens: an adapter without trainable tokens does not load after one with them.
# saved: fails for a layer on which another adapter has LoRA. score: needs another model class.
PEFT = Capabilities(
    backend="--backend peft",
    adapters=frozenset({"lora", "alora", "lora_bias", "embedding", "dora"}),
    mixes_adapters=False,
    shares_prefix=False,
    keeps_kv=False,
    cuts_prompts=False,
    generates=True,
    other_bases=False,
)
# PEFT refuses `adapter_names` with DoRA.
PEFT_MIXED = Capabilities(
    backend="--backend peft --peft-batching mixed",
    adapters=PEFT.adapters - {"dora"},
    mixes_adapters=True,
    shares_prefix=False,
    keeps_kv=False,
    cuts_prompts=False,
    generates=True,
    other_bases=False,
)
# vLLM 0.32 refuses most other kinds by name. It would read LoRA on the output head, but pads and shards it by its own
# rules. Its score heads need the base to be loaded as a classifier, for all adapters.
VLLM = Capabilities(
    backend="--backend vllm",
    adapters=frozenset({"lora"}),
    mixes_adapters=True,
    shares_prefix=False,
    keeps_kv=True,
    cuts_prompts=True,
    generates=True,
    other_bases=True,
)
BACKENDS = (NATIVE, VLLM, PEFT, PEFT_MIXED)

_ABILITIES = {
    "mixes_adapters": "adapters mixed in one forward pass",
    "shares_prefix": "a prefix that activated adapters share, computed once",
    "keeps_kv": "K/V kept for the next turn (`conversation_id`)",
    "cuts_prompts": "long prompts in chunks",
    "generates": "text: several tokens, sampling, logit bias, top log probabilities",
    "other_bases": "quantized bases, and those whose attention cannot be packed",
}


def backend_table() -> str:
    """Return the table of docs/backends.md."""

    def row(name: str, has: list[bool]) -> str:
        return f"| {name} | {' | '.join('yes' if one else 'no' for one in has)} |"

    lines = [f"| | {' | '.join(f'`{one.backend}`' for one in BACKENDS)} |", "|---|" + "---|" * len(BACKENDS)]
    lines += [row(words, [kind in one.adapters for one in BACKENDS]) for kind, words in KINDS.items()]
    lines += [row(words, [getattr(one, name) for one in BACKENDS]) for name, words in _ABILITIES.items()]
    return "\n".join(lines)
