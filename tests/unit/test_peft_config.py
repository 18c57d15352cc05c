"""Which layers a config means, at which rank and scaling: as PEFT's own code says it."""

import dataclasses
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loraplex.adapters.peft_config import INERT_KEYS, REFUSED_KEYS, PeftConfig

PATHS = [
    "model.embed_tokens",
    "lm_head",
    "h.1.attn.c_attn",
    "transformer.h.10.attn.c_attn",
    *(f"model.layers.{i}.{name}" for i in (0, 1, 12) for name in ("self_attn.q_proj", "mlp.up_proj")),
    "model.layers.1.mlp.experts.7.up_proj",
    "encoder.layers.0.blocks.3.q_proj",
]
ENDS = sorted({path.split(".", cut)[-1] for path in PATHS for cut in range(6)})
REGEXES = [r".*q_proj", r".*\.layers\.[01]\..*", r"model\.layers\.1.*", r"(.*\.)?up_proj|lm_head", "all-nothing", "h"]
names = st.lists(st.sampled_from([*ENDS, "proj", "attn", "s.1"]), max_size=3)
keys = st.sampled_from([*ENDS, *REGEXES, "proj", r"\.q_proj", "layers", "q_proj|up_proj"])


@given(
    target_modules=st.sampled_from(REGEXES) | names,
    exclude_modules=st.none() | st.sampled_from(REGEXES) | names,
    modules_to_save=st.none() | st.lists(st.sampled_from(["lm_head", "embed_tokens", "mlp", "h.1"]), max_size=2),
    layers_to_transform=st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
    layers_pattern=st.none() | st.sampled_from(["", "layers", "h", "blocks", "(layers|h)"]) | st.just(["h", "layers"]),
    rank_pattern=st.dictionaries(keys, st.integers(1, 9), max_size=3),
    alpha_pattern=st.dictionaries(keys, st.integers(1, 9), max_size=3),
)
@example(  # the first number after a list's name is the layer's, not an expert's
    target_modules=["up_proj"],
    exclude_modules=None,
    modules_to_save=None,
    layers_to_transform=[1],
    layers_pattern=None,
    rank_pattern={},
    alpha_pattern={},
)
@settings(max_examples=250, deadline=None)
def test_layers_are_matched_as_peft_matches_them(
    target_modules: str | list[str], rank_pattern: dict[str, int], alpha_pattern: dict[str, float], **keys: Any
) -> None:
    if isinstance(target_modules, str) or keys["layers_to_transform"] is None:
        keys |= {"layers_to_transform": None, "layers_pattern": None}
    given = {"target_modules": target_modules, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, **keys}
    ours = PeftConfig(peft_type="LORA", r=8, lora_alpha=16, **given)
    theirs = LoraConfig(r=8, lora_alpha=16, **given)
    for path in PATHS:
        assert ours.targets(path, True) == bool(check_target_module_exists(theirs, path)), path
        rank = rank_pattern.get(get_pattern_key(list(rank_pattern), path), 8)
        alpha = alpha_pattern.get(get_pattern_key(list(alpha_pattern), path), 16)
        assert ours.rank_and_scaling(path) == (rank, alpha / rank), path


def test_every_key_of_pefts_config_is_known() -> None:
    """One that a new PEFT adds must be thought about, although it is refused until then."""
    known = INERT_KEYS | REFUSED_KEYS.keys() | PeftConfig.model_fields.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known
