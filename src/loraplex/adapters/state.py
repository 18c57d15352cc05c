"""What was loaded, unloaded and pinned at run time, so that a restart or a kill finds it again."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from loraplex.errors import BundleError

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """source: where the name was loaded from; None: it was unloaded."""

    name: str
    source: str | None
    is_pinned: bool


class AdapterState:
    """One SQLite file; each change is a transaction that is on disk when the call returns. Any thread may call, and
    raises BundleError where the file cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "loraplex.sqlite"
        self._held = FileLock(folder / "loraplex.lock", thread_local=False)
        self._lock = threading.Lock()  # SQLite's own makes its waiters sleep and ask again
        with self._database() as database:
            # Of every file, also a new one. Written each time, so that a place that takes no writes is found at once.
            [(found,)] = database.execute("PRAGMA user_version")
            if found not in (0, FORMAT):
                raise sqlite3.DatabaseError(f"it has format {found}, this version knows {FORMAT}")
            database.execute(f"PRAGMA user_version = {FORMAT}")
            database.execute(
                "CREATE TABLE IF NOT EXISTS adapters"
                " (name TEXT PRIMARY KEY, source TEXT, is_pinned INTEGER NOT NULL) STRICT"
            )
        self.remembered()

    def remembered(self) -> tuple[Remembered, ...]:
        """In the order in which they were first remembered."""
        with self._database() as database:
            rows = database.execute("SELECT name, source, is_pinned FROM adapters ORDER BY rowid").fetchall()
        return tuple(Remembered(name=name, source=source, is_pinned=bool(pinned)) for name, source, pinned in rows)

    def remember(self, *, name: str, source: str | None, is_pinned: bool) -> None:
        with self._database() as database:
            database.execute(
                "INSERT INTO adapters VALUES (?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET source = excluded.source, is_pinned = excluded.is_pinned",
                (name, source, int(is_pinned)),
            )

    def acquire(self) -> None:
        """For this process alone, until `release` or its end: of two servers each would forget what the other did."""
        try:
            self._held.acquire(timeout=0)
        except (Timeout, OSError):
            raise BundleError(
                self._path.parent, "another server uses it", remedy="stop that one, or give another --state-dir"
            ) from None

    def release(self) -> None:
        self._held.release()

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, closing(sqlite3.connect(self._path, timeout=10)) as database, database:
                database.execute("PRAGMA synchronous = EXTRA")  # FULL may lose the last change when the power fails
                yield database
        except (OSError, sqlite3.Error) as exc:
            raise BundleError(
                self._path,
                f"cannot be read or written: {exc}",
                remedy="give another --state-dir, or move the file away",
            ) from None
