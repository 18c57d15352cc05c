"""Imports point downward, heavy libraries stay where they belong, and nothing is a `utils` package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loraplex

ROOT = Path(loraplex.__file__).parent
# From the bottom up. A module may import its own layer and those before it.
LAYERS = [
    {"types", "errors", "config", "metrics", "database"},
    {"classifier", "client"},
    {"bundle"},
    {"ops"},
    {"model", "adapters"},
    {"engine"},
    {"backends"},
    {"routing"},
    {"inprocess", "server"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# library -> the only places that may import it
ONLY_IN = {
    "torch": {
        "ops",
        "model",
        "adapters/checkpoint",
        "backends/peft",
        "backends/vllm",
        "adapters/plan",
        "adapters/weights",
        "backends/native",
        "engine/batch",
        "engine/outcomes",
        "engine/runner",
    },
    "transformers": {
        "model",
        "engine/tokenizer",
        "engine/runner",
        "cli/options",
        "backends/native",
        "backends/peft",
        "backends/vllm",
    },
    "safetensors": {"adapters/checkpoint", "model/loader"},
    "threadpoolctl": {"model/machine"},
    "vllm": {"backends/vllm_engine"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "typer": {"cli"},
    "rich": {"cli", "client"},
    "peft": {"backends/peft"},
    "huggingface_hub": {"bundle", "adapters/source"},
    "boto3": {"adapters/source"},
    "prometheus_client": {"metrics"},
    "yaml": {"config"},
    "sqlite3": {"database", "routing/route_store", "routing/verdict_log"},
}


def modules() -> Iterator[tuple[str, list[str]]]:
    """("engine/batch", imported modules) for every file below the package, its root aside."""
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


def test_model_and_adapters_know_the_engine_by_protocol_only_and_servers_no_engine() -> None:
    for name, imported in MODULES.items():
        if name.startswith("server/"):
            above = [
                one for one in imported if one.startswith(("loraplex.engine", "loraplex.model", "loraplex.adapters"))
            ]
            assert not above, f"{name} imports {above}"
            assert not [one for one in imported if one.startswith("loraplex.backends") and ".base" not in one]


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_where_it_belongs(library: str) -> None:
    users = {name for name, imported in MODULES.items() if any(one.split(".")[0] == library for one in imported)}
    stray = {name for name in users if name not in ONLY_IN[library] and name.split("/")[0] not in ONLY_IN[library]}
    assert not stray, f"{library} is imported by {sorted(stray)}"


def test_every_layer_is_known() -> None:
    assert {name.split("/")[0] for name in MODULES} == set(RANK)
