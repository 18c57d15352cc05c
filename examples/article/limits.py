"""The article's figures beside what an A10G (ml.g5.2xlarge) allows a Mistral 7B in bfloat16.

    python examples/article/limits.py

The shape is that of Mistral's config.json, the two rates are NVIDIA's data sheet's; src/loraplex/hardware has both with
their sources. No GPU is needed: it is arithmetic.
"""

from loraplex.hardware.bases import known_base
from loraplex.hardware.devices import device

MISTRAL, A10G = known_base("mistral-7b-v0.1").config, device("a10g")
HIDDEN, INTERMEDIATE, VOCAB, LAYERS, HEADS, KV_HEADS = (
    int(MISTRAL[key])
    for key in (
        *("hidden_size", "intermediate_size", "vocab_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    )
)
BYTES = 2  # of a number in bfloat16

kv = HIDDEN * KV_HEADS // HEADS
LINEAR = {  # layer -> (inputs, outputs)
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, kv),
    "v_proj": (HIDDEN, kv),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
weights = LAYERS * sum(inputs * outputs for inputs, outputs in LINEAR.values())
pass_s = (weights + HIDDEN * VOCAB) * BYTES / A10G.bytes_per_s  # each weight is read once, the head's too
token_flop = 2 * weights
kv_bytes = 2 * LAYERS * kv * BYTES  # keys and values of a token


def adapter_mb(rank: int, *layers: str) -> float:
    return LAYERS * sum(rank * sum(LINEAR[layer]) for layer in layers) * BYTES / 1e6


def most_tokens(seconds: float) -> float:
    """Return the tokens that the A10G can compute in that time if nothing else takes any."""
    return A10G.flops_per_s * seconds / token_flop


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
for claim, limit in (
    ("P50 of 18 ms with vLLM", f"reading the weights once takes {pass_s * 1000:.1f} ms"),
    ("45 requests/s with vLLM", f"a request has {most_tokens(1 / 45):.0f} tokens at most, at the full rate"),
    ("P50 of 45 ms with PEFT", f"a request has {most_tokens(0.045):.0f} tokens at most, at the full rate"),
    ("7 GB of K/V for 30-40 sequences of 4K", f"{7e9 / (4096 * kv_bytes):.0f} sequences"),
    ("8K of context is ~2 GB of K/V", f"{8192 * kv_bytes / 1e9:.2f} GB"),
    (
        "an adapter of rank 32 is ~85 MB",
        f"{adapter_mb(32, *ATTENTION):.0f} MB on attention, {adapter_mb(32, *LINEAR):.0f} MB on all linear layers",
    ),
    ("base 14 GB", f"{(weights + 2 * HIDDEN * VOCAB) * BYTES / 1e9:.1f} GB"),
):
    print(f"{claim:40} {limit}")
