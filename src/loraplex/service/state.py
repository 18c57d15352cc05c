"""Remembers which adapters were loaded, unloaded and pinned at run time, also after a kill."""

import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from loraplex.database import Database
from loraplex.errors import StateError

logger = logging.getLogger(__name__)

BUNDLE = "bundle:"  # the remembered source of an adapter in the bundle's own folder, wherever the bundle is
FORMAT = 1
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS adapters (name TEXT PRIMARY KEY, source TEXT, is_pinned INTEGER NOT NULL) STRICT",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """The last state of a name. source: where the name was loaded from; None: the name was unloaded."""

    name: str
    source: str | None
    is_pinned: bool


class AdapterState:
    """One SQLite file. Each change is a transaction that is on disk when the call returns. Any thread may call. Every
    method raises StateError where the file cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: int | None = None  # descriptor of the folder
        self._file = FileLock(folder / "loraplex.lock", timeout=0, thread_local=False)
        self._database = Database(folder / "loraplex.sqlite", format=FORMAT, schema=SCHEMA)

    def remembered(self) -> tuple[Remembered, ...]:
        """Return all names, in the order in which they were first remembered."""
        with self._database.transaction() as database:
            rows = database.execute("SELECT name, source, is_pinned FROM adapters ORDER BY rowid").fetchall()
        return tuple(Remembered(name=name, source=source, is_pinned=bool(pinned)) for name, source, pinned in rows)

    def remember(self, *, name: str, source: str | None, is_pinned: bool) -> None:
        with self._database.transaction() as database:
            database.execute(
                "INSERT INTO adapters VALUES (?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET source = excluded.source, is_pinned = excluded.is_pinned",
                (name, source, int(is_pinned)),
            )

    def acquire(self) -> None:
        """Lock the folder for this process until `release` or the end of the process, because two servers would
        overwrite each other's changes. Raises StateError where another server has the lock.

        The folder itself is locked, so that deleting the lock file lets nobody in. The lock file keeps servers on
        other machines out, too."""
        for lock in (self._lock_folder, self._file.acquire):
            try:
                lock()
            except (BlockingIOError, Timeout):
                self.release()
                raise StateError(
                    f"{self._folder}: another server uses it", remedy="stop that one, or give another --state-dir"
                ) from None
            except OSError as exc:  # a folder that cannot be written, or a file system without one of the locks
                logger.warning("%s cannot be locked: %s", self._folder, exc)

    def _lock_folder(self) -> None:
        self._held = os.open(self._folder, os.O_RDONLY)
        fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        self._file.release()
        if self._held is not None:
            os.close(self._held)
            self._held = None
