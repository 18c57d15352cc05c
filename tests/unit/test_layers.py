"""Imports point downward, heavy libraries stay where they belong, and nothing is a `utils` package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loraplex

ROOT = Path(loraplex.__file__).parent
# From the bottom up. A module may import its own layer and those before it.
LAYERS = [
    {
        "cascades",
        "decisions",
        "messages",
        "state",
        "types",
        "generation",
        "errors",
        "addresses",
        "amounts",
        "problems",
        "questions",
        "config",
        "metrics",
        "database",
        "disk",
        "environment",
        "exhaustion",
        "machine",
        "hub_cache",
        "measuring",
        "hardware",
    },
    {"classifier", "client", "discovery"},
    {"bundle", "io_yaml", "labelled", "same_conversation"},
    {"text", "ops"},
    {"model", "adapters"},
    {"engine"},
    {"executors"},
    {"planning"},
    {"service"},
    {"routing"},
    {"inprocess", "server"},
    {"evaluation"},
    {"bench", "costs", "sagemaker", "training"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# library -> the only places that may import it
ONLY_IN = {
    "torch": {
        "machine",
        "measuring",
        "ops",
        "model",
        "adapters/checkpoint",
        "adapters/plan",
        "adapters/tensor_file",
        "adapters/weights",
        "engine/outcomes",
        "engine/pack",
        "engine/runner",
        "executors/native",
        "executors/peft",
        "executors/vllm",
        "planning",
        "training",
    },
    "transformers": {
        "model",
        "training",
        "text/tokenizer",
        "cli/options",
        "executors/native",
        "executors/peft",
        "executors/vllm",
        "planning",
    },
    "safetensors": {"adapters/checkpoint", "training/output"},
    "threadpoolctl": {"machine"},
    "psutil": {"measuring/cores", "measuring/memory"},
    "vllm": {"executors/vllm_client"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "typer": {"cli"},
    "rich": {"cli", "client"},
    "peft": {"executors/peft", "training/output"},
    "huggingface_hub": {"bundle", "adapters/hub"},
    "boto3": {"adapters/s3", "sagemaker"},
    "prometheus_client": {"metrics", "measuring/readings"},
    "yaml": {"config", "evaluation/contract_file"},
    "sqlite3": {"database", "routing/route_store", "routing/verdict_log"},
}


def modules() -> Iterator[tuple[str, list[str]]]:
    """("engine/pack", imported modules) for every file below the package, its root aside."""
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        imported = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import"
                imported += [f"{node.module}.{alias.name}" for alias in node.names]
        if name != "__init__":
            yield name, imported


MODULES = dict(modules())


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name: str) -> None:
    layer = name.split("/")[0]
    for imported in MODULES[name]:
        parts = imported.split(".")
        if parts[0] == "loraplex" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= RANK[layer], f"{name} imports {imported}, which is above it"


# room -> rooms below it that it does not know all the same
STRANGERS = {
    "adapters": {"model"},
    "routing": {"adapters", "engine", "executors", "model", "ops", "text"},
    "server": {"adapters", "engine", "executors", "model", "ops", "text"},
}


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_keep_to_their_seams(room: str) -> None:
    for name, imported in MODULES.items():
        if name.startswith(f"{room}/"):
            found = [one for one in imported if one.startswith("loraplex.") and one.split(".")[1] in STRANGERS[room]]
            assert not found, f"{name} imports {found}"


def test_patching_and_the_shared_step_are_private_to_one_file() -> None:
    """Elsewhere the layers take the step's inputs as an argument."""
    for path in (ROOT / "model").glob("*.py"):
        if path.name != "hooked.py":
            text = path.read_text()
            assert "AttentionInterface" not in text.replace("transformers' AttentionInterface", ""), path.name
            assert "register_forward" not in text and ".forward = " not in text and "setattr(" not in text, path.name


def test_no_file_holds_two_nouns() -> None:
    """Or at least none is long enough to."""
    longest = max(ROOT.rglob("*.py"), key=lambda path: len(path.read_text().splitlines()))
    assert len(longest.read_text().splitlines()) <= 400, longest


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_where_it_belongs(library: str) -> None:
    users = {name for name, imported in MODULES.items() if any(one.split(".")[0] == library for one in imported)}
    stray = {name for name in users if name not in ONLY_IN[library] and name.split("/")[0] not in ONLY_IN[library]}
    assert not stray, f"{library} is imported by {sorted(stray)}"


def test_every_layer_is_known() -> None:
    assert {name.split("/")[0] for name in MODULES} == set(RANK)
