"""An adapter of another base is warned of where both names are known, and only then."""

import json
from pathlib import Path

import pytest

from loraplex.adapters.base_name import ServedBase

CACHED = "models--Qwen--Qwen3-0.6B/snapshots/0123abc"


def served(tmp_path: Path, folder: str = "bundle", name: str | None = None) -> ServedBase:
    path = tmp_path / folder
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({} if name is None else {"_name_or_path": name}))
    return ServedBase(path)


@pytest.mark.parametrize(("folder", "name"), [("Qwen3-0.6B", None), (CACHED, None), ("bundle", "Qwen/Qwen3-0.6B")])
@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ("Qwen/Qwen3-0.6B", False),
        ("unsloth/qwen3-0.6b-unsloth-bnb-4bit", False),
        ("Qwen/Qwen3-0.6B-GPTQ-Int4", False),
        ("Qwen/Qwen3-0.6B-AWQ", False),
        ("Qwen/Qwen3-0.6B@main", False),
        ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/9", False),
        ("Qwen/Qwen3-0.6B-Base", True),
        ("Qwen/Qwen3-1.7B", True),
        ("meta-llama/Llama-3.2-1B", True),
        ("/root/.cache/huggingface/hub/models--gpt2/snapshots/9", True),
        ("gpt2", True),
        # What says nothing about the base.
        (None, False),
        ("", False),
        ("/not/on/this/machine/Llama-3.2-1B", False),
        ("../Llama-3.2-1B", False),
        ("C:\\models\\Llama-3.2-1B", False),
        ("base", False),
        ("outputs/merged", False),
        ("outputs/checkpoint-500", False),
    ],
)
def test_names_are_compared_by_the_model_they_mean(
    tmp_path: Path, folder: str, name: str | None, given: str | None, warned: bool
) -> None:
    warnings = served(tmp_path, folder, name).warn_of(given)
    assert len(warnings) == warned
    if warned:
        assert repr(given) in warnings[0] and "'Qwen3-0.6B'" in warnings[0] and "base_model_name_or_path" in warnings[0]


@pytest.mark.parametrize("folder", ["bundle", "base", "bundle_v2", "0"])
def test_a_base_whose_name_is_not_known_warns_of_nothing(tmp_path: Path, folder: str) -> None:
    assert served(tmp_path, folder).warn_of("meta-llama/Llama-3.2-1B") == ()


def test_a_path_on_this_machine_counts(tmp_path: Path) -> None:
    base = served(tmp_path, "Qwen3-0.6B")
    other = tmp_path / "Llama-3.2-1B"
    other.mkdir()
    assert base.warn_of(str(tmp_path / "Qwen3-0.6B")) == ()
    assert len(base.warn_of(str(other))) == 1
