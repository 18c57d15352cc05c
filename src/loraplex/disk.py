"""Files that others may write while they are read, folders that appear complete, and Git LFS pointers in the place of
files. Knows no format."""

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from loraplex.errors import BundleError, ConfigurationError

POINTER = b"version https://git-lfs.github.com/spec/"
SETTLED_S = 0.01  # a file system's clock may tick this slowly: two writes within one tick look alike
CHANGED = "changed while it was read"
WRITE_ELSEWHERE = (
    "copy the new version to a new folder, and rename the folder or load it from there; "
    "if a copy was under way, try again when it is complete"
)


class Stamp(NamedTuple):
    """Identifies one state of a file. The system alone sets `changed_ns`; a copy may keep `modified_ns`."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def stamp_of(found: os.stat_result) -> Stamp:
    return Stamp(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextmanager
def unchanged(paths: Sequence[Path], error: type[ConfigurationError]) -> Iterator[None]:
    """Raise `error` where a file changed while the block read the files. A missing file may stay missing.

    The change explains whatever the block raised, so `error` replaces that, too. Waits up to SETTLED_S where a file was
    written just now."""
    before = {path: _stamp(path) for path in paths}
    youngest = max((stamp.changed_ns for stamp in before.values() if stamp is not None), default=0)
    age = time.time() - youngest / 1e9
    if 0 <= age < SETTLED_S:
        time.sleep(SETTLED_S - age)
    try:
        yield
    except Exception:
        _check_same(before, error)
        raise
    _check_same(before, error)


def _check_same(before: Mapping[Path, Stamp | None], error: type[ConfigurationError]) -> None:
    for path, stamp in before.items():
        if _stamp(path) != stamp:
            raise error(path, CHANGED, remedy=WRITE_ELSEWHERE) from None


def _stamp(path: Path) -> Stamp | None:
    try:
        return stamp_of(path.stat())
    except OSError:
        return None


def refuse_pointer(path: Path, start: bytes, error: type[ConfigurationError]) -> None:
    """Raise `error` where the file, which starts with `start`, is a Git LFS pointer."""
    if start.startswith(POINTER):
        raise error(path, "is a Git LFS pointer and not the file itself", remedy="run `git lfs pull` in its repository")


def refuse_pointers(paths: Iterable[Path], error: type[ConfigurationError]) -> None:
    """Raise `error` where one of the files is a Git LFS pointer. Skips files that cannot be opened."""
    for path in paths:
        with suppress(OSError), path.open("rb") as file:
            refuse_pointer(path, file.read(len(POINTER)), error)


def folder_beside(out: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder beside `out`, in which to make what is then renamed to `out`. Raises BundleError where
    none can be made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=out.parent, prefix=".new-")
    except OSError as exc:
        raise BundleError(out, f"cannot be written: {exc.strerror or exc}", remedy="name another folder") from None
