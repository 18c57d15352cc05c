"""What each backend can do: declared here, refused at load where it cannot, and shown in docs/backends.md."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.kinds import KINDS
from loraplex.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """backend: as options choose it.
    adapters: the kinds (`KINDS`) of which any mix is served exactly, on one base, in any order of coming and going.
    mixes_adapters: in one forward pass. shares_prefix: what sequences have in common is computed once.
    keeps_kv: from one call to the next. cuts_prompts: a long one into chunks, between which others are answered.
    generates: text of several tokens, sampling, logit bias and top log probabilities included.
    other_bases: those that are quantized, or whose attention cannot be packed.
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
        """AdapterError where an adapter of these kinds would not be served exactly."""
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
# As PEFT 0.21 was found to be, by tests/contract/test_adapter_kinds.py. Several adapters on one model go wrong:
# bias: PEFT writes it into the base, so that all others compute with it; of two it refuses the second.
# other_embedding: the same, and without a word. tying: the second adapter's LoRA is not tied.
# tokens: no adapter without them loads behind one that has them. saved: not of a layer on which another has LoRA.
# score: the model is another class.
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
# `adapter_names` is refused under DoRA.
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
# vLLM 0.32 refuses most others by name. It would read a LoRA on the output head, but pads and shards it by rules of its
# own; and its score heads need the base to be loaded as a classifier, for all.
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
    """The table of docs/backends.md."""

    def row(name: str, has: list[bool]) -> str:
        return f"| {name} | {' | '.join('yes' if one else 'no' for one in has)} |"

    lines = [f"| | {' | '.join(f'`{one.backend}`' for one in BACKENDS)} |", "|---|" + "---|" * len(BACKENDS)]
    lines += [row(words, [kind in one.adapters for one in BACKENDS]) for kind, words in KINDS.items()]
    lines += [row(words, [getattr(one, name) for one in BACKENDS]) for name, words in _ABILITIES.items()]
    return "\n".join(lines)
