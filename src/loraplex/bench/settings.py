"""What a run of the benchmark does: every option, checked before anything is loaded."""

import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from loraplex.bench.process import probe
from loraplex.bench.served import BACKENDS, LIBRARIES
from loraplex.bench.supply import Asking
from loraplex.bench.system import Transport
from loraplex.bundle import Bundle, open_bundle
from loraplex.config import EngineConfig, resolve
from loraplex.errors import ConfigurationError, UnknownClassifierError, listed, quoted
from loraplex.labelled import Labelled, hard_label, read_labelled
from loraplex.service.preparation import EFFECTS

MOST_CONVERSATIONS = 3000  # as in the article
MOST_ARRIVALS = 200_000  # in a slice: they are kept in memory
LLAMACPP = "llamacpp"
SYSTEMS = (*BACKENDS, LLAMACPP)
VERSIONS = ("loraplex", "torch", "transformers", "peft", "vllm")
OURS = ("report.json", "report.md", "report.html")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of `loraplex bench`, as docs/bench.md explains them. Exactly one of rate, concurrency and sweep says
    how conversations are asked.

    engine:  options of EngineConfig for every system on which they have an effect.
    only:    system -> further options, for this system alone.
    python:  system -> the interpreter that runs it.
    urls:    system -> a server that already runs.
    llamacpp_server, llamacpp_model, llamacpp_arguments:
             llama.cpp's program, a GGUF file of the bundle's base, and more options of the program.
    """

    bundle: str
    data: Path
    out: Path
    systems: tuple[str, ...] = tuple(BACKENDS)
    classifiers: tuple[str, ...] = ()
    conversations: int | None = None
    rate: float | None = None
    concurrency: int | None = None
    sweep: bool = False
    transport: Transport = "http"
    asking: Asking = "together"
    turns: bool = False
    slices: int = 5
    seconds: float = 20.0
    timeout_s: float = 300.0
    seed: int = 0
    engine: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    python: Mapping[str, str] = field(default_factory=dict)
    urls: Mapping[str, str] = field(default_factory=dict)
    llamacpp_server: Path | None = None
    llamacpp_model: Path | None = None
    llamacpp_arguments: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that can begin.

    rows:      the conversations, in the order in which they are asked.
    truth:     row -> classifier -> right label.
    labels:    classifier -> its contract's labels.
    strangers: names that the data has labels for, and the bundle has no classifier of -> how many conversations.
    engine:    system -> all of its options.
    versions:  system -> distribution -> version in the system's interpreter.
    skipped:   system -> why it cannot be measured.
    """

    settings: Settings
    bundle: Bundle
    rows: tuple[Labelled, ...]
    classifiers: tuple[str, ...]
    truth: Mapping[int, Mapping[str, str]]
    labels: Mapping[str, Sequence[str]]
    strangers: Mapping[str, int]
    engine: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, Mapping[str, str]]
    skipped: Mapping[str, str]

    @property
    def systems(self) -> tuple[str, ...]:
        return tuple(name for name in self.settings.systems if name not in self.skipped)


def prepare(settings: Settings) -> Prepared:
    """Check a run. Reads the data and the bundle's small files, and imports no PyTorch. Raises ConfigurationError, or
    UnknownClassifierError, for the first thing that is wrong."""
    _check_numbers(settings)
    _check_systems(settings)
    _check_out(settings.out)
    bundle = open_bundle(settings.bundle)
    engine = {name: _engine(settings, name, bundle) for name in settings.systems if name in BACKENDS}
    names = _classifiers(settings.classifiers, bundle)
    labels = {one.name: one.contract.labels for one in bundle.adapters if one.contract and one.name in names}
    rows = _sample(settings, read_labelled(settings.data, labels))
    versions, skipped = _interpreters(settings)
    if len(skipped) == len(settings.systems):
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ConfigurationError("--systems", f"none of them can be measured: {why}", remedy="install one of them")
    return Prepared(
        settings=settings,
        bundle=bundle,
        rows=rows,
        classifiers=names,
        truth={
            index: {name: hard_label(row.labels[name], known) for name, known in labels.items() if name in row.labels}
            for index, row in enumerate(rows)
        },
        labels=labels,
        strangers=Counter(
            name for row in rows for name in row.labels if all(name != one.name for one in bundle.adapters)
        ),
        engine=engine,
        versions=versions,
        skipped=skipped,
    )


def _check_numbers(settings: Settings) -> None:
    loads = {"--rate": settings.rate, "--concurrency": settings.concurrency, "--sweep": settings.sweep or None}
    given = [name for name, value in loads.items() if value is not None]
    if len(given) != 1:
        raise ConfigurationError(
            " and ".join(given) or "the load", "exactly one load is measured", remedy=f"give one of {', '.join(loads)}"
        )
    bounds: Mapping[str, tuple[float | None, int]] = {
        "--rate": (settings.rate, 10**5),
        "--concurrency": (settings.concurrency, 10**4),
        "--conversations": (settings.conversations, 10**6),
        "--slices": (settings.slices, 10**3),
        "--seconds": (settings.seconds, 10**5),
        "--timeout": (settings.timeout_s, 10**5),
    }
    for name, (value, most) in bounds.items():
        if value is not None and not 0 < value <= most:
            raise ConfigurationError(
                f"{name} {value:g}", f"is not above 0 and at most {most:,}", remedy="give another number"
            )
    if settings.rate is not None and settings.rate * settings.seconds > MOST_ARRIVALS:
        raise ConfigurationError(
            f"--rate {settings.rate:g}",
            f"is {settings.rate * settings.seconds:,.0f} conversations in a slice of {settings.seconds:g} s",
            remedy=f"give a lower --rate or fewer --seconds; a slice takes {MOST_ARRIVALS:,} at most",
        )
    for name, chosen, kind in (("--ask", settings.asking, Asking), ("transport", settings.transport, Transport)):
        if chosen not in get_args(kind):
            raise ConfigurationError(f"{name} {chosen}", "is unknown", remedy=f"give one of {listed(get_args(kind))}")


def _check_systems(settings: Settings) -> None:
    unknown = [name for name in settings.systems if name not in SYSTEMS]
    if unknown or not settings.systems or len(set(settings.systems)) != len(settings.systems):
        what = f"there is no system {quoted(unknown[0])}" if unknown else "name each system once"
        raise ConfigurationError("--systems", what, remedy=f"give some of {','.join(SYSTEMS)}")
    for option, given in (("--python", settings.python), ("--url", settings.urls), ("--engine", settings.only)):
        for name in given:
            if name not in settings.systems:
                raise ConfigurationError(
                    f"{option} {name}", "is for a system that is not measured", remedy="name it in --systems, too"
                )
    for name, program in settings.python.items():
        if shutil.which(program) is None:
            raise ConfigurationError(
                f"--python {name}={program}", "is no program", remedy="give the path of an interpreter"
            )
    _check_llamacpp(settings)
    if settings.transport == "in-process" and settings.urls:
        raise ConfigurationError("--url", "a running server is asked over HTTP", remedy="leave out --in-process")


def _check_llamacpp(settings: Settings) -> None:
    """Raise ConfigurationError for options that llama.cpp's server does not take, and for files that are not there."""
    files = {"--llamacpp-server": settings.llamacpp_server, "--llamacpp-model": settings.llamacpp_model}
    given = {option: file for option, file in files.items() if file is not None}
    for option, file in given.items():
        if not file.is_file():
            raise ConfigurationError(f"{option} {file}", "is no file", remedy="correct the path")
    if given and (LLAMACPP not in settings.systems or LLAMACPP in settings.urls):
        is_asked = LLAMACPP in settings.urls
        raise ConfigurationError(
            next(iter(given)),
            "is for a server that is started here" if is_asked else "is for a system that is not measured",
            remedy=f"leave out --url {LLAMACPP}" if is_asked else f"name {LLAMACPP} in --systems, too",
        )
    if len(given) == 1:
        missing = next(option for option in files if option not in given)
        raise ConfigurationError(next(iter(given)), f"needs {missing}", remedy="give both")
    for option, names in (("--python", settings.python), ("--engine", settings.only)):
        if LLAMACPP in names:
            remedy = "give options of its own with --llamacpp-arg"
            raise ConfigurationError(f"{option} {LLAMACPP}", "has no effect on llama.cpp's server", remedy=remedy)
    if LLAMACPP in settings.systems and settings.transport == "in-process":
        raise ConfigurationError(
            "--in-process", "llama.cpp's server is asked over HTTP", remedy=f"leave it out, or {LLAMACPP}"
        )


def _check_out(out: Path) -> None:
    """Raise ConfigurationError where a folder holds what this command did not write."""
    if not os.path.lexists(out):
        return
    problem = ""
    if not out.is_dir():
        problem = "is no folder"
    elif any(out.iterdir()):
        try:
            is_ours = json.loads((out / OURS[0]).read_text())["kind"] == "bench"
        except (OSError, ValueError, KeyError, TypeError):
            is_ours = False
        problem = "" if is_ours else "is a folder with other files in it"
    if problem:
        raise ConfigurationError(f"--out {out}", problem, remedy="name a new folder, or one of an earlier run")


def _engine(settings: Settings, name: str, bundle: Bundle) -> Mapping[str, Any]:
    """Return a system's options: those for all systems that have an effect on it, and its own. Raises
    ConfigurationError where one is unknown or has another value."""
    shared = resolve(EngineConfig, bundle.settings.engine, {**BACKENDS[name], **settings.engine})
    useful = {key: getattr(shared, key) for key in settings.engine if key not in EFFECTS or EFFECTS[key][0](shared)}
    own = settings.only.get(name, {})
    config = resolve(EngineConfig, bundle.settings.engine, {**BACKENDS[name], **useful, **own})
    return {key: getattr(config, key) for key in {**BACKENDS[name], **useful, **own}}


def _classifiers(given: tuple[str, ...], bundle: Bundle) -> tuple[str, ...]:
    """Return the classifiers to ask; by default those that have a contract, or else all."""
    known = [one.name for one in bundle.adapters]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UnknownClassifierError(unknown, known)
    names = given or tuple(one.name for one in bundle.adapters if one.contract is not None) or tuple(known)
    if not names:
        raise ConfigurationError(bundle.base, "has no classifiers", remedy="give a bundle with adapters")
    return tuple(dict.fromkeys(names))


def _sample(settings: Settings, rows: tuple[Labelled, ...]) -> tuple[Labelled, ...]:
    num = settings.conversations or min(len(rows), MOST_CONVERSATIONS)
    if num > len(rows):
        raise ConfigurationError(
            f"--conversations {num}", f"{settings.data} holds {len(rows)}", remedy="ask fewer, or give more data"
        )
    if settings.concurrency is not None and num < settings.slices:
        raise ConfigurationError(
            f"--slices {settings.slices}", f"there are {num} conversations", remedy="give fewer slices, or more data"
        )
    return tuple(random.Random(settings.seed).sample(rows, len(rows))[:num])


def _interpreters(settings: Settings) -> tuple[Mapping[str, Mapping[str, str]], Mapping[str, str]]:
    """Return the versions that each system's interpreter has, and why systems cannot be measured."""
    versions: dict[str, Mapping[str, str]] = {}
    skipped: dict[str, str] = {}
    found: dict[str, Mapping[str, str]] = {}
    if LLAMACPP in settings.systems and LLAMACPP not in settings.urls and settings.llamacpp_server is None:
        skipped[LLAMACPP] = "no server is given (--llamacpp-server and --llamacpp-model, or --url llamacpp=URL)"
    for name in settings.systems:
        if name not in BACKENDS or name in settings.urls:
            continue
        python = settings.python.get(name, sys.executable)
        if python not in found:
            try:
                found[python] = probe(python, VERSIONS)
            except OSError as exc:
                found[python] = MappingProxyType({})
                skipped[name] = str(exc)
        versions[name] = found[python]
        for library in ("loraplex", LIBRARIES[name]):
            if library not in found[python]:
                skipped.setdefault(name, f"{library} is not installed" + _remedy(name, library))
    return versions, skipped


def _remedy(name: str, library: str) -> str:
    extra = {"peft": "pip install 'loraplex[bench]'", "vllm": "pip install 'loraplex[vllm]'"}.get(library)
    return f" ({extra}, or --python {name}=PATH of an interpreter that has it)" if extra else ""
