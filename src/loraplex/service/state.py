"""Remembers which adapters were loaded, unloaded and pinned at run time, also after a kill."""

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from loraplex.database import Database
from loraplex.errors import BundleError

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
    method raises BundleError where the file cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = FileLock(folder / "loraplex.lock", thread_local=False)
        self._database = Database(folder / "loraplex.sqlite", format=FORMAT, schema=SCHEMA)
        self.remembered()

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
        overwrite each other's changes. Raises BundleError where another server has the lock."""
        try:
            self._held.acquire(timeout=0)
        except (Timeout, OSError):
            raise BundleError(
                self._folder, "another server uses it", remedy="stop that one, or give another --state-dir"
            ) from None

    def release(self) -> None:
        self._held.release()
