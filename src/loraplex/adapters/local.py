"""Finds adapters on this machine: folders and archives."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from loraplex.adapters.archive import unpack
from loraplex.adapters.cache import cached
from loraplex.adapters.files import ARCHIVE, FILES, SHAPES, ResolvedSource, SourceLimits, check, sizes_of
from loraplex.bundle import ADAPTER_CONFIG, MARKERS
from loraplex.discovery import folders_with
from loraplex.disk import unchanged
from loraplex.errors import AdapterError, listed
from loraplex.hub_cache import snapshot_of


def from_roots(given: str, roots: Sequence[Path], cache_dir: Path, limits: SourceLimits) -> ResolvedSource:
    """Return the adapter at a path below one of `roots`, after following symlinks.

    Raises AdapterError where the path lies outside the roots, or holds no adapter."""
    tops = [os.path.realpath(root) for root in roots]

    def inside(path: str | Path) -> bool:
        return any(Path(os.path.realpath(path)).is_relative_to(top) for top in tops)

    # Check the location before the existence, so that no client learns which files exist outside the roots.
    candidates = [path for root in roots if inside(path := Path(os.path.abspath(root)) / given)]
    if not candidates:
        raise AdapterError(
            given,
            "does not lie below an adapter root",
            remedy="move it there, or start with --adapter-root DIR, a folder that holds it",
        )
    named = next((path for path in candidates if os.path.exists(path)), None)
    if named is None:
        raise AdapterError(
            given, "no such folder below an adapter root", remedy=f"check the path and --adapter-root, or give {SHAPES}"
        )
    return _adapter_at(given, named, inside, cache_dir, limits)


def from_anywhere(given: str, cache_dir: Path, limits: SourceLimits) -> ResolvedSource | None:
    """Return the adapter at a path; None where nothing is there. Raises AdapterError where it holds no adapter."""
    named = Path(os.path.abspath(os.path.expanduser(given)))
    return _adapter_at(given, named, lambda _: True, cache_dir, limits) if os.path.lexists(named) else None


def _adapter_at(
    given: str, named: Path, inside: Callable[[str | Path], bool], cache_dir: Path, limits: SourceLimits
) -> ResolvedSource:
    """inside: whether a path may be read, after following symlinks."""
    path = Path(os.path.realpath(named))
    if path.is_file() and given.endswith(ARCHIVE):
        archive, stat = path, path.stat()
        version = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"

        def build(work: Path) -> Path:
            with unchanged([archive], AdapterError):
                return unpack(archive, work, given, limits)

        path = cached(cache_dir, str(archive), version, build)
    elif not path.is_dir():
        raise AdapterError(given, f"neither a folder nor a {ARCHIVE}", remedy="give the folder that PEFT saved")
    else:
        path = snapshot_of(path, MARKERS, AdapterError)
        for name in FILES:
            if not inside(path / name):
                raise AdapterError(
                    given,
                    f"its {name} is a link that points outside the adapter roots",
                    remedy="copy the file there, or start with --adapter-root DIR, a folder that holds it too",
                )
    sizes = sizes_of(path)
    if ADAPTER_CONFIG not in sizes:
        nested = [f"{given.rstrip('/')}/{one.name}" for one in folders_with(path, ADAPTER_CONFIG) if inside(one)]
        if nested:
            raise AdapterError(
                given, f"no {ADAPTER_CONFIG} in it, but in folders in it", remedy=f"give one of {listed(nested)}"
            )
    check(given, sizes, limits)
    return ResolvedSource(path=path, source=str(named), remote=False)
