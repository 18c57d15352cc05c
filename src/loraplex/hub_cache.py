"""The hub's cache on disk: `models--org--name/snapshots/<commit>`, and `refs/<revision>`, which holds a commit."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from loraplex.errors import BundleError, ConfigurationError, listed

REPOSITORY = re.compile(r"models--(?:(?P<org>.+?)--)?(?P<name>.+)")


def public_name(folder: str | Path) -> str:
    """Return the name of a folder as it is given: its last part, and a link's own name. The hub's id where the folder
    is a repository in the hub's cache, or one of its snapshots."""
    path = Path(os.path.abspath(folder))
    if in_cache(path):
        path = path.parent.parent
    cached = REPOSITORY.fullmatch(path.name)
    if cached is not None:
        return "/".join(part for part in cached.groups() if part)
    return path.name or "base"  # the root folder has no name


def in_cache(folder: Path) -> bool:
    """Return whether the folder is a snapshot in the hub's cache."""
    return folder.parent.name == "snapshots" and REPOSITORY.fullmatch(folder.parent.parent.name) is not None


def snapshot_of(folder: Path, files: Iterable[str], error: type[ConfigurationError] = BundleError) -> Path:
    """Return the snapshot that `folder` stands for if it is a repository in the hub's cache, else `folder` itself: the
    snapshot that `refs/main` names, or else the only one.

    files:  a folder that holds one of these is no repository. Raises `error` where there is no such snapshot."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or any((folder / name).is_file() for name in files):
        return folder
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else None
    chosen = [path for path in found if path.name == commit] or found
    if len(chosen) != 1:
        raise error(
            folder,
            f"is a repository in the hub's cache with {len(found)} snapshots, and refs/main names none of them",
            remedy=f"give one of {listed([str(path) for path in found])}" if found else "download it again",
        )
    return chosen[0]
