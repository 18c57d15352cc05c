"""A SQLite database: on a file, or in memory where nothing has to survive the process."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from loraplex.errors import BundleError

TIMEOUT_S = 10.0  # wait for another process that holds the file


class Database:
    """Runs transactions; each is on disk when it ends. Any thread may call.

    Raises BundleError where the file cannot be read or written."""

    def __init__(self, path: Path | None, *, format: int, schema: Iterable[str]) -> None:
        """path:    the file; None keeps the database in memory.
        format:  number of the schema; a file with another number is refused.
        schema:  statements that run at each start, also on a file that has the schema already."""
        self._path = path
        self._lock = threading.Lock()  # SQLite's own lock makes waiters sleep and poll
        self._memory = sqlite3.connect(":memory:", check_same_thread=False) if path is None else None
        with self.transaction() as database:
            # Checked on every file. Written each time, so that a file that cannot be written is found at the start.
            [(found,)] = database.execute("PRAGMA user_version")
            if found not in (0, format):
                raise sqlite3.DatabaseError(f"it has format {found}, this version knows {format}")
            database.execute(f"PRAGMA user_version = {format}")
            for statement in schema:
                database.execute(statement)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction: all of it is written, or nothing."""
        try:
            with self._lock:
                if self._memory is not None:
                    with self._memory:
                        yield self._memory
                    return
                assert self._path is not None
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(self._path, timeout=TIMEOUT_S)) as database, database:
                    database.execute("PRAGMA synchronous = EXTRA")  # FULL may lose the last change when the power fails
                    yield database
        except (OSError, sqlite3.Error) as exc:
            raise BundleError(
                self._path or "memory",
                f"cannot be read or written: {exc}",
                remedy="give another --state-dir, or move the file away",
            ) from None
