"""Checks before a start all that can be checked without PyTorch, so that a mistake is told at once."""

import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.peft_config import read_peft_config
from loraplex.bundle import Bundle, check_routes
from loraplex.cascades import check_gates
from loraplex.config import EngineConfig
from loraplex.errors import MOST_SHOWN, BundleError, ConfigurationError, UnsupportedModelError
from loraplex.executors.vllm_arguments import read_arguments
from loraplex.service.state import BUNDLE, AdapterState

# Option -> whether the settings do what it says, and what it takes for that.
EFFECTS: dict[str, tuple[Callable[[EngineConfig], bool], str]] = {
    "vllm_arg": (lambda config: config.backend == "vllm", "--backend vllm"),
    "peft_batching": (lambda config: config.backend == "peft", "--backend peft"),
    "cuda_graphs": (lambda config: config.backend == "native", "--backend native"),
    "kv_cache": (lambda config: config.backend != "peft" or config.kv_cache == "0", "--backend native or vllm"),
    "adapter_memory": (lambda config: config.backend != "vllm", "--backend native or peft"),
    "max_step_sequences": (
        lambda config: config.backend != "peft" or config.peft_batching == "mixed" or config.max_step_sequences == 1,
        "--peft-batching mixed",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """Holds what a start needs, checked.

    state:    what was changed at run time, locked for this process; None without a state directory.
    base_names: the names that ask the base; the first is shown.
    names:    the adapters that requests can name after the start.
    own:      those of the bundle that were not replaced or unloaded at run time.
    preload:  those to load at the start; None for all.
    """

    state: AdapterState | None
    base_names: tuple[str, ...]
    names: frozenset[str]
    own: frozenset[str]
    preload: frozenset[str] | None


def prepare(bundle: Bundle, config: EngineConfig) -> Preparation:
    """Check the settings against each other, the bundle and the disk, and lock the state directory. Imports no PyTorch.

    Raises ConfigurationError, which names the option at fault."""
    check_backend(config)
    for root in config.adapter_root:
        _check_folder("--adapter-root", Path(root), Path(root))
    if config.state_dir is not None:
        folder = Path(config.state_dir)
        _check_folder("--state-dir", folder, folder if os.path.lexists(folder) else folder.absolute().parent)
    state = None if config.state_dir is None else AdapterState(Path(config.state_dir))
    if state is not None:
        state.acquire()
    try:
        own, names = _names(bundle, state)
        base_names = _base_names(bundle, config, names)
        check_routes(bundle.settings.routes, base_names, names.__contains__)
        _check_gates(bundle, names, own)
        preload = _preloaded(config.preload, bundle, state)
        for source in bundle.adapters:
            if source.name in (own if preload is None else own & preload) and bundle.requires(source.name):
                read_peft_config(source.path)
        return Preparation(state=state, base_names=base_names, names=names, own=own, preload=preload)
    except BaseException:
        if state is not None:
            state.release()
        raise


def _check_gates(bundle: Bundle, names: Collection[str], own: Collection[str]) -> None:
    routes, contracts = bundle.settings.routes, {one.name: one.contract for one in bundle.adapters if one.name in own}
    # A classifier that was unloaded at run time is still one of the bundle: it may come back.
    known = {*names, *routes, *(source.name for source in bundle.adapters)}

    def labels_of(name: str) -> dict[str, tuple[str, ...]]:
        targets = routes[name].targets if name in routes else (name,)
        return {one: contract.labels for one in targets if (contract := contracts.get(one)) is not None}

    check_gates(bundle.settings.gates, known.__contains__, labels_of)


def check_effects(config: EngineConfig, given: Collection[str]) -> None:
    """Raise ConfigurationError for an option that would be ignored. given: names of the options that the user gave.
    Settings of a bundle's file are not checked, so that the file serves with every backend."""
    for name, (has_effect, needed) in EFFECTS.items():
        value = getattr(config, name)
        is_default = value == EngineConfig.model_fields[name].default  # written out, perhaps by a script
        if name in given and not is_default and not has_effect(config):
            shown = " ".join(value) if isinstance(value, tuple) else "" if value is True else value
            raise ConfigurationError(
                f"--{name.replace('_', '-')} {shown}".rstrip(),
                f"has no effect with --backend {config.backend}",
                remedy=f"leave it out, or give {needed}",
            )
    if "adhoc_correction" in given and config.adhoc_correction == "none" and not config.adhoc_questions:
        raise ConfigurationError(
            "--adhoc-correction none",
            "has no effect without --adhoc-questions",
            remedy="leave it out, or give --adhoc-questions",
        )
    if config.cuda_graphs and config.device == "cpu":
        raise UnsupportedModelError(
            "--device cpu", "CUDA graphs are for CUDA devices only", remedy="leave out --cuda-graphs"
        )


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def check_backend(config: EngineConfig) -> None:
    """Raise ConfigurationError where the backend's library is not installed, or does not take its arguments."""
    if config.backend == "peft" and not is_installed("peft"):
        raise ConfigurationError(
            "--backend peft", "PEFT is not installed", remedy="pip install 'loraplex[train]', or --backend native"
        )
    if config.backend == "vllm" and not is_installed("vllm"):
        raise ConfigurationError(
            "--backend vllm",
            "vLLM is not installed",
            remedy="pip install 'loraplex[vllm]', or --backend native; for a CPU see docs/backends.md",
        )
    read_arguments(config.vllm_arg)


def _check_folder(option: str, given: Path, needed: Path) -> None:
    if not os.path.isdir(needed):  # False also where it may not be looked at
        problem = "is no folder" if needed == given else f"cannot be made: there is no folder {str(needed)!r}"
        raise ConfigurationError(f"{option} {given}", problem, remedy="correct the path, or make the folder")


def _names(bundle: Bundle, state: AdapterState | None) -> tuple[frozenset[str], frozenset[str]]:
    """Return the bundle's own adapters that are there after the start, and all that are."""
    remembered = () if state is None else state.remembered()
    changed = {one.name for one in remembered if one.source != BUNDLE}
    own = frozenset(source.name for source in bundle.adapters if source.name not in changed)
    return own, own.union(one.name for one in remembered if one.source not in (None, BUNDLE))


def _base_names(bundle: Bundle, config: EngineConfig, names: Collection[str]) -> tuple[str, ...]:
    base_names = tuple(dict.fromkeys(config.served_model_name)) or (bundle.base_name,)
    for name in base_names:
        if name in names or any(source.name == name for source in bundle.adapters):
            source = f"--served-model-name {name}" if config.served_model_name else str(bundle.base)
            raise BundleError(
                source,
                f"{name!r} names the base and a classifier",
                remedy="rename the classifier, or give the base another --served-model-name",
            )
    return base_names


def _preloaded(preload: str, bundle: Bundle, state: AdapterState | None) -> frozenset[str] | None:
    if preload in ("all", "none"):
        return None if preload == "all" else frozenset()
    remembered = () if state is None else state.remembered()
    known = [*(source.name for source in bundle.adapters), *(one.name for one in remembered)]
    names = frozenset(name.strip() for name in preload.split(",") if name.strip())
    unknown = sorted(names.difference(known))
    if unknown or not names:
        raise ConfigurationError(
            f"--preload {preload}",
            f"there is no classifier {unknown[0]!r}" if unknown else "names no classifier",
            remedy=f"give all, none, or names with commas; there are: {', '.join(known[:MOST_SHOWN]) or 'none'}",
        )
    return names
