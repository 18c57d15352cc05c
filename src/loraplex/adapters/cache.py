"""A disk cache of adapters that were unpacked or downloaded: one folder for each version of a source."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from loraplex.adapters.files import sizes_of
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def cache_folder(state_dir: str | None) -> Path:
    """Return where adapters are unpacked and downloaded to: below the state directory, or else in the user's cache."""
    if state_dir is not None:
        return Path(state_dir) / "adapters"
    home = os.path.expanduser("~")  # stays "~" for a user without one
    ours = Path(home, ".cache") if home != "~" else Path(tempfile.gettempdir())
    return Path(os.environ.get("XDG_CACHE_HOME") or ours) / "loraplex"


def cached(cache_dir: Path, source: str, version: str, build: Callable[[Path], Path]) -> Path:
    """Return the folder that holds this version of `source`. Builds the folder where the cache does not hold it yet.

    build:  fills an empty folder and returns the folder with the adapter, which is then moved into the cache.
    A file lock for each source lets one thread or process build at a time."""
    home = Path(os.path.abspath(cache_dir)) / digest_of(source)
    path, work = home / digest_of(version), home / "work"
    if not _whole(path):
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "lock"):
            if not _whole(path):
                for leftover in (path, work):
                    shutil.rmtree(leftover, ignore_errors=True)
                work.mkdir()
                try:
                    build(work).rename(path)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    return path


def _whole(path: Path) -> bool:
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(sizes_of(path))


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
