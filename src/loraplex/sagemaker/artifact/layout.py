"""Lays out an artifact: the files of a bundle under the names that SageMaker expects. Reads no weights."""

import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import loraplex
from loraplex.adapters.files import FILES
from loraplex.bundle import ADAPTER_CONFIG, BASE_FILES, PROMPT_FILES, SETTINGS, AdapterSource, Bundle
from loraplex.config import SERVED_NAME, BundleSettings, EngineConfig, resolve, write_bundle_settings
from loraplex.discovery import CHECKPOINT, lines_of
from loraplex.errors import BundleError, ConfigurationError, quoted
from loraplex.model.base_weights import FILE, INDEX, weight_files
from loraplex.sagemaker.artifact.manifest import MANIFEST

CODE = "code"
# What transformers and vLLM read of a base, beside the weights.
BASE_NAMES = (
    *BASE_FILES,
    "tokenizer.json",
    "tokenizer.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
LICENCE = re.compile(r"(licen[cs]e|notice|copying)([._-].*)?", re.IGNORECASE)
# Settings that name a file or a folder of this machine.
OF_THIS_MACHINE = {"engine": ("state_dir", "adapter_root"), "server": ("api_key_file",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file of an artifact. content: the file that holds it, or its bytes."""

    name: str
    content: Path | bytes
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The files of an artifact, by name, but for the manifest.

    base_name:  the base's name; None where it is only the name of the bundle's folder.
    notes:      what was left out although the user may expect it, a line each.
    """

    members: tuple[Member, ...]
    base_name: str | None
    notes: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        return [one.content for one in self.members if isinstance(one.content, Path)]

    @property
    def num_bytes(self) -> int:
        return sum(one.size for one in self.members)


def lay_out(bundle: Bundle) -> Layout:
    """Return the artifact's layout: the base at the root, a folder for each adapter, the settings, and `code/`.

    Links are followed, and an adapter in another's folder gets a folder of its own. Raises ConfigurationError where a
    name in the bundle cannot be one in the artifact."""
    content: dict[str, Path | bytes] = {path.name: path for path in _base_files(bundle.base)}
    if bundle.root is not None and bundle.root != bundle.base:
        for path in _licences(bundle.root):
            content[f"bundle-{path.name}" if path.name in content else path.name] = path
    taken = {*content, CODE, SETTINGS, MANIFEST}
    for source in bundle.adapters:
        _check_folder_name(source, taken)
        content |= {f"{source.name}/{path.name}": path for path in _adapter_files(source.path)}
    base_name = _given_name(bundle)
    settings, left_out = _settings(bundle.settings, base_name)
    if text := write_bundle_settings(settings):
        content[SETTINGS] = text.encode()
    content |= _code(resolve(EngineConfig, settings.engine, {}).backend)
    notes = [*lines_of(bundle.skipped), *left_out]
    return Layout(members=tuple(_members(content)), base_name=base_name, notes=tuple(notes))


def _members(content: Mapping[str, Path | bytes]) -> Iterator[Member]:
    for name, one in sorted(content.items()):
        try:
            size = len(one) if isinstance(one, bytes) else one.stat().st_size
        except OSError as exc:
            raise BundleError(one, f"is not readable: {exc.strerror or exc}", remedy="check the file") from None
        yield Member(name=name, content=one, size=size)


def _base_files(folder: Path) -> list[Path]:
    """Return the base's files that a server reads, and its licence."""
    weights = weight_files(folder)
    for path in weights:
        if path.parent != folder:
            raise BundleError(
                folder / INDEX,
                f"names the shard {quoted(str(path))}, which is not beside it",
                remedy="save the base again with save_pretrained(…)",
            )
    names = BASE_NAMES if weights == [folder / FILE] else (*BASE_NAMES, INDEX)
    return [*(folder / name for name in names if (folder / name).is_file()), *weights, *_licences(folder)]


def _adapter_files(folder: Path) -> list[Path]:
    """Return the adapter's files that a server reads, and its licence. Where the adapter has the tokenizer of the
    adapter whose folder it lies in, as `text/adapter_prompt.py` says, these files are its own in the artifact."""
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not any(path.name in PROMPT_FILES for path in files) and (folder.parent / ADAPTER_CONFIG).is_file():
        files += [folder.parent / name for name in PROMPT_FILES if (folder.parent / name).is_file()]
    return [*files, *_licences(folder)]


def _licences(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if LICENCE.fullmatch(path.name) and path.is_file())


def _check_folder_name(source: AdapterSource, taken: Iterable[str]) -> None:
    name = source.name
    if name in taken:
        what = "the entry point's folder" if name == CODE else "a file"
        raise BundleError(
            source.path,
            f"a classifier named {name!r} cannot be packed: {name} is {what} at the artifact's root",
            remedy="rename the classifier's folder, or give it another name with --adapter NAME=SOURCE",
        )
    if CHECKPOINT.fullmatch(name):
        raise BundleError(
            source.path,
            f"a classifier named {name!r} cannot be packed: a folder of that name in a bundle is never served",
            remedy="give another name: --adapter NAME=SOURCE",
        )


def _given_name(bundle: Bundle) -> str | None:
    """Return the base's name if the settings, the hub or its cache give it. In the container, the artifact's folder has
    another name than the bundle's has here."""
    served = resolve(EngineConfig, bundle.settings.engine, {}).served_model_name
    if served:
        return served[0]
    is_given = bundle.settings.base is not None or bundle.root is None or "/" in bundle.base_name
    return bundle.base_name if is_given else None


def _settings(settings: BundleSettings, base_name: str | None) -> tuple[BundleSettings, list[str]]:
    """Return the settings as the artifact has them, and what was left out of them, a line each."""
    parts = {"engine": dict(settings.engine), "server": dict(settings.server)}
    notes = []
    for part, keys in OF_THIS_MACHINE.items():
        for key in keys:
            if parts[part].pop(key, None):
                option = f"LORAPLEX_{key.upper()}"
                notes.append(f"left out of {SETTINGS}: {part}.{key}, a path of this machine (there: {option})")
    if base_name is not None and SERVED_NAME.fullmatch(base_name):
        parts["engine"].setdefault("served_model_name", base_name)
    return settings.model_copy(update={"base": None, **parts}), notes


def _code(backend: str) -> dict[str, Path | bytes]:
    """Return the files of `code/`, which is on sys.path in AWS's images: the entry point, what pip installs there, and
    this package, because no index has it."""
    root = Path(loraplex.__file__).parent
    content: dict[str, Path | bytes] = {
        f"{CODE}/inference.py": root / "sagemaker" / "inference.py",
        f"{CODE}/requirements.txt": _requirements(backend).encode(),
    }
    for path in root.rglob("*"):
        inner = path.relative_to(root)
        if (path.suffix == ".py" or path.name == "py.typed") and not any(part[0] == "." for part in inner.parts):
            content[f"{CODE}/loraplex/{inner.as_posix()}"] = path
    for name in ("LICENSE", "NOTICE"):
        if text := importlib.metadata.distribution("loraplex").read_text(f"licenses/{name}"):
            content[f"{CODE}/loraplex/{name}"] = text.encode()
    return content


def _requirements(backend: str) -> str:
    """Return what serving needs, without PyTorch and vLLM: the images bring builds for their CUDA."""
    try:
        required = importlib.metadata.requires("loraplex") or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigurationError(
            "loraplex",
            "is not installed here, so what it needs is not known",
            remedy="install it where you pack: pip install -e . in its repository",
        ) from None
    needed = [one for one in required if "extra ==" not in one and not re.match(r"torch\b", one)]
    if backend == "peft":
        needed += [one.partition(";")[0] for one in required if re.match(r"peft\b", one)]
    return "".join(f"{one}\n" for one in sorted(needed, key=str.lower))
