"""Finds adapters' folders below a folder, and names the folders that it leaves out. Opens no file."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

MOST_DEEP = 16  # levels below the root that are searched
MOST_LOOKED_INTO = 10_000  # folders of a hidden folder or a checkpoint that are searched for adapters to report
CHECKPOINT = re.compile(r"checkpoint-\d+")  # as Hugging Face's Trainer names them


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedFolder:
    """A folder that was left out of the search although it may hold an adapter."""

    path: str
    reason: str


def lines_of(skipped: Iterable[SkippedFolder]) -> list[str]:
    """Return one line of a log for the folders that lie in one folder and were left out for one reason."""
    groups: dict[tuple[Path, str], list[str]] = {}
    for one in skipped:
        path = Path(one.path)
        groups.setdefault((path.parent, one.reason), []).append(path.name)
    return [f"left out of {parent}: {', '.join(names)} ({reason})" for (parent, reason), names in groups.items()]


@dataclass(frozen=True, slots=True)
class Found:
    """Folders that hold an adapter, depth first and by name, and those that were left out although they hold one."""

    folders: tuple[Path, ...]
    skipped: tuple[SkippedFolder, ...]


def find_adapters(root: Path, config_name: str) -> Found:
    """Return the folders below `root` with a file `config_name`. Folders in such a folder are searched, too: PEFT saves
    the second adapter of a model there. What cannot be read is skipped."""
    search = _Search(config_name)
    if (root / config_name).is_file():
        search.skip(root, "the bundle's own folder; an adapter needs a folder of its own")
    search.walk(root, frozenset())
    return Found(tuple(search.folders), tuple(search.skipped))


def folders_with(folder: Path, config_name: str) -> list[Path]:
    """Return the folders directly in `folder` that hold a file `config_name`, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{config_name}"))


class _Search:
    def __init__(self, config_name: str) -> None:
        self._config_name = config_name
        self.folders: list[Path] = []
        self.skipped: list[SkippedFolder] = []

    def skip(self, folder: Path, reason: str) -> None:
        self.skipped.append(SkippedFolder(path=str(folder), reason=reason))

    def walk(self, folder: Path, above: frozenset[tuple[int, int]]) -> None:
        """Search the folders in `folder`. above: device and inode of the folders above it."""
        try:
            stat = folder.stat()
            children = sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir())
        except OSError as exc:  # such as lost+found, which only root may read
            return self.skip(folder, f"not readable: {exc.strerror}")
        if (stat.st_dev, stat.st_ino) in above:
            return self.skip(folder, "a link to a folder above it")
        above |= {(stat.st_dev, stat.st_ino)}
        for child in children:
            reason = self._reason(child, len(above))
            if reason is not None:
                if self._holds_any(child):
                    self.skip(child, reason)
                continue
            if os.path.isfile(child / self._config_name):
                self.folders.append(child)
            self.walk(child, above)

    def _reason(self, folder: Path, depth: int) -> str | None:
        """Return why a folder is not searched; None where it is."""
        if folder.name.startswith("."):
            return "hidden: its name begins with '.'"
        if CHECKPOINT.fullmatch(folder.name):
            if os.path.isfile(folder.parent / self._config_name):
                return "a trainer's checkpoint"
            return "a trainer's checkpoint, and its run was not saved; to serve one, give --adapter NAME=FOLDER"
        return f"more than {MOST_DEEP} folders deep" if depth > MOST_DEEP else None

    def _holds_any(self, folder: Path) -> bool:
        looked_into = islice(os.walk(folder), MOST_LOOKED_INTO)
        return any(self._config_name in files for _, _, files in looked_into)
