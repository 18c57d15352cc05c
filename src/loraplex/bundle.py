"""Opens a bundle: a folder, or a base and named adapters. Reads JSON and YAML only, no weights."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraplex.classifier import Contract, read_contract
from loraplex.config import BundleSettings, RouteSettings, read_bundle_settings
from loraplex.discovery import Found, SkippedFolder, find_adapters, folders_with
from loraplex.disk import refuse_pointers
from loraplex.errors import BundleError, ConfigurationError, listed, quoted
from loraplex.hub_cache import public_name, snapshot_of
from loraplex.io_yaml import IO_YAML, read_intrinsic

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter's folder says about its prompts, as trainers save it.
PROMPT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
CONTRACT, SETTINGS = "classifier.yaml", "loraplex.yaml"
MARKERS = ("config.json", ADAPTER_CONFIG, SETTINGS)  # what the folder of a base, an adapter or a bundle holds
# What transformers reads of a base, beside the weights.
BASE_FILES = (
    "config.json generation_config.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt chat_template.jinja chat_template.json".split()
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """A PEFT adapter's folder, and its contract if it has one. error: why the folder cannot be opened."""

    name: str
    path: Path
    contract: Contract | None
    error: ConfigurationError | None = None

    @property
    def contract_path(self) -> Path:
        """The file that says what the contract is."""
        is_intrinsic = (self.path / IO_YAML).is_file() and not (self.path / CONTRACT).is_file()
        return self.path / (IO_YAML if is_intrinsic else CONTRACT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A base, adapters and settings to serve.

    base_name:    the base as the user named it: a folder's last part, or an id on the hub.
    named:        adapters that the command line or the caller named.
    require_all:  whether any adapter that cannot be loaded ends the start; otherwise only those in `named` do.
    skipped:      folders that were left out although they hold an adapter.
    """

    base: Path
    base_name: str
    root: Path | None = None  # the folder that holds the bundle, if there is one
    adapters: tuple[AdapterSource, ...]
    settings: BundleSettings = field(default_factory=BundleSettings)
    named: frozenset[str] = frozenset()
    require_all: bool = True
    skipped: tuple[SkippedFolder, ...] = ()

    def __post_init__(self) -> None:
        for source in self.adapters:
            if source.error is not None and self.requires(source.name):
                raise source.error

    def with_adapters(self, folders: Mapping[str, Path]) -> "Bundle":
        """Return the bundle with further adapters (name -> folder), which must load. Raises BundleError where a name is
        taken or not valid, and ConfigurationError where a folder cannot be opened."""
        self.check_names(folders)
        added = tuple(open_adapter(name, folder) for name, folder in folders.items())
        return replace(self, adapters=(*self.adapters, *added), named=self.named | folders.keys())

    def check_names(self, named: Mapping[str, object]) -> None:
        """Raise BundleError where a name is taken, or cannot name a classifier. named: name -> where it is from."""
        taken = {source.name: source.path for source in self.adapters}
        for name, source in named.items():
            check_name(name, source)
            if name in taken:
                raise BundleError(
                    source,
                    f"a second classifier named {name!r}; the first is {taken[name]}",
                    remedy="give another name",
                )

    def requires(self, name: str) -> bool:
        """Return whether the start ends where this adapter cannot be loaded."""
        return self.require_all or name in self.named


def open_bundle(path: str | Path, require_all: bool = True) -> Bundle:
    """Read the bundle at `path`. Raises BundleError or ContractError, which name what is wrong.

    The base is at the root of `path`, or where `loraplex.yaml` says. Each folder below `path` with an
    `adapter_config.json` is an adapter, except a trainer's checkpoints and hidden folders. Without `require_all`, an
    adapter that cannot be opened has its error in its source."""
    root, settings, base, base_name = _open_root(path)
    found = find_adapters(root, ADAPTER_CONFIG) if root.is_dir() else Found((), ())
    sources: dict[str, AdapterSource] = {}
    for folder in found.folders:
        name = folder.name
        if name in sources:
            raise BundleError(
                folder,
                f"a second classifier named {name!r}; the first is {sources[name].path}",
                remedy="rename one of the folders; a folder whose name begins with '.' is left out",
            )
        check_name(name, folder)
        try:
            sources[name] = open_adapter(name, folder)
        except ConfigurationError as exc:
            sources[name] = AdapterSource(name=name, path=folder, contract=None, error=exc.with_traceback(None))
    return Bundle(
        base=base,
        base_name=base_name,
        root=root if root.is_dir() else None,
        adapters=tuple(sources.values()),
        settings=settings,
        require_all=require_all,
        skipped=found.skipped,
    )


def check_name(name: str, source: object = "adapter") -> None:
    """Raise BundleError where `name` cannot name a classifier."""
    if not NAME.fullmatch(name):
        raise BundleError(
            source,
            f"{quoted(name)} cannot name a classifier",
            remedy="use letters, digits, '.', '_' and '-', 128 at most",
        )


def check_routes(
    routes: Mapping[str, RouteSettings], base_names: Collection[str], knows: Callable[[str], bool]
) -> None:
    """Raise BundleError where a route of `loraplex.yaml` has a name that is not valid, or an unknown target. knows:
    whether there is an adapter of a name."""
    for name, settings in routes.items():
        source = f"loraplex.yaml, routes.{name}"
        check_name(name, source)
        if name in base_names:
            raise BundleError(source, f"{name!r} is also the base's name", remedy="choose another name for the route")
        for target in (*settings.targets, *settings.shadows):
            if not knows(target):
                what = f"there is no classifier {target!r}"
                if target in routes:
                    what = f"{target!r} is a route, and routes lead to classifiers only"
                raise BundleError(source, what, remedy="use a classifier of the bundle")


def open_base(path: str) -> Bundle:
    """Open the base at `path` (or where its `loraplex.yaml` says) without any adapters."""
    _, settings, base, base_name = _open_root(path)
    return Bundle(base=base, base_name=base_name, adapters=(), settings=settings)


def open_adapter(name: str, folder: Path) -> AdapterSource:
    """Check that `folder` looks like a PEFT adapter, and read its contract. Raises BundleError or ContractError."""
    check_name(name, folder)
    if not folder.is_dir():
        raise BundleError(folder, f"no such folder (adapter {name!r})", remedy="give the folder that PEFT saved")
    if not (folder / ADAPTER_CONFIG).is_file():
        nested = [str(one) for one in folders_with(folder, ADAPTER_CONFIG)]
        raise BundleError(
            folder,
            f"no {ADAPTER_CONFIG} in it" + (", but in folders in it" if nested else ""),
            remedy=f"give one of {listed(nested)}" if nested else "give the folder that PEFT's save_pretrained wrote",
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise BundleError(
                folder / "adapter_model.bin",
                "pickled weights are never loaded: they can run code",
                remedy="load it with PEFT where you trust it and save_pretrained(…), which writes safetensors",
            )
        raise BundleError(folder, f"no {ADAPTER_WEIGHTS} in it", remedy="save the adapter with PEFT's save_pretrained")
    contract = None
    if (folder / CONTRACT).is_file():
        contract = read_contract(folder / CONTRACT)
    elif (folder / IO_YAML).is_file():
        contract = read_intrinsic(folder / IO_YAML).contract
    return AdapterSource(name=name, path=folder, contract=contract)


def read_json(path: Path, error: type[ConfigurationError] = BundleError) -> dict[str, Any]:
    refuse_pointers([path], error)
    try:
        return parse_json(path, path.read_bytes(), error)
    except OSError as exc:
        raise error(path, f"not readable as JSON: {exc}", remedy="save or copy the file again") from None


def parse_json(path: Path, given: bytes, error: type[ConfigurationError] = BundleError) -> dict[str, Any]:
    """Return the object that the file at `path` holds. given: what was read from it."""
    try:
        content = json.loads(given.decode())
    except (ValueError, RecursionError) as exc:
        raise error(path, f"not readable as JSON: {exc}", remedy="save or copy the file again") from None
    if not isinstance(content, dict):
        raise error(path, f"holds a {type(content).__name__}, not an object", remedy="save or copy the file again")
    return content


def _open_root(path: str | Path) -> tuple[Path, BundleSettings, Path, str]:
    """Return the bundle's folder, its settings, the base's folder, and the base's name as it was given."""
    given = str(path)
    root = snapshot_of(Path(path), MARKERS)
    settings_path = root / SETTINGS
    settings = read_bundle_settings(settings_path) if settings_path.is_file() else BundleSettings()
    source = given
    if settings.base is not None:
        source, given = f"{settings_path}, base", settings.base
    folder = Path(path) if settings.base is None else root / given
    if folder.is_dir():
        return root, settings, _checked_base(source, snapshot_of(folder, MARKERS)), public_name(folder)
    return root, settings, _checked_base(source, _from_hub(given, source)), given


def _checked_base(source: str, folder: Path) -> Path:
    """Return the base's folder, checked for the files that a server needs."""
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise BundleError(
                source,
                "is an adapter, without a base",
                remedy=f"give BASE --adapter {folder.name}={folder}, or its bundle",
            )
        raise BundleError(
            source,
            f"no config.json in {folder}, so there is no base model",
            remedy=f"put a Hugging Face base there, or name one in {SETTINGS}: `base: path-or-hub-id`",
        )
    read_json(folder / "config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise BundleError(source, f"no tokenizer in {folder}", remedy="copy the base's tokenizer files there")
    tokenizer = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "tokenizer.model"
    refuse_pointers((folder / name for name in (*BASE_FILES, tokenizer)), BundleError)
    weights = ["model.safetensors"]
    if not (folder / "model.safetensors").is_file():
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            raise BundleError(
                source,
                f"no model.safetensors (or model.safetensors.index.json) in {folder}",
                remedy="save the base with save_pretrained(…), which writes safetensors; pickles are never loaded",
            )
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise BundleError(index, "key 'weight_map' is missing", remedy="save or copy the file again")
        weights = sorted(set(map(str, shards.values())))
        for shard in weights:
            if not (folder / shard).is_file():
                raise BundleError(index, f"names the shard {shard!r}, which is missing", remedy="copy that file too")
    refuse_pointers((folder / name for name in weights), BundleError)
    return folder


def _from_hub(name: str, source: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        raise BundleError(
            source, f"no folder {name!r}", remedy="give the path of a bundle or a base, or a hub id org/name"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except Exception as exc:  # huggingface_hub raises many types, httpx's among them; all mean that fetching failed
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise BundleError(
            source,
            f"no folder {name!r}, and it cannot be fetched from the hub: {reason}",
            remedy="check the path or the id; set HF_TOKEN for a gated base, HF_HUB_OFFLINE=1 to use the cache only",
        ) from None
