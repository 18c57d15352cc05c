"""What was loaded, unloaded and pinned at run time, so that a restart or a kill finds it again."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from loraplex.errors import BundleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """source: where the name was loaded from; None: it was unloaded."""

    name: str
    source: str | None
    is_pinned: bool


class AdapterState:
    """One SQLite file; each change is a transaction that is on disk when the call returns. Any thread may call."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "loraplex.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS adapters"
                    " (name TEXT PRIMARY KEY, source TEXT, is_pinned INTEGER NOT NULL) STRICT"
                )
        except (OSError, sqlite3.Error) as exc:
            raise BundleError(
                self._path, f"cannot be opened: {exc}", remedy="give another --state-dir, or move the file away"
            ) from None

    def remembered(self) -> tuple[Remembered, ...]:
        with closing(self._open()) as database:
            rows = database.execute("SELECT name, source, is_pinned FROM adapters ORDER BY rowid").fetchall()
        return tuple(Remembered(name=name, source=source, is_pinned=bool(pinned)) for name, source, pinned in rows)

    def remember(self, *, name: str, source: str | None, is_pinned: bool) -> None:
        with closing(self._open()) as database, database:
            database.execute(
                "INSERT INTO adapters VALUES (?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET source = excluded.source, is_pinned = excluded.is_pinned",
                (name, source, int(is_pinned)),
            )

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=10)
        database.execute("PRAGMA synchronous = FULL")
        return database
