"""A SQLite database: on a file, or in memory where nothing has to survive the process."""

import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from loraplex.errors import StateError

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0  # wait for another process that holds the file
SHAPE = """
    SELECT shape.type, shape.name, columns.name
    FROM sqlite_master AS shape LEFT JOIN pragma_table_info(shape.name) AS columns
"""


class Database:
    """Runs transactions; each is on disk when it ends. Any thread may call.

    A file that exists is opened only if it is whole and has the schema, so that an emptied or replaced file does not
    pass for a new one. A file that can be read but not written is opened all the same, with an error in the log: then
    reading works, and so does writing as soon as the file can be written again.

    Raises StateError where the file cannot be read or written, or where it was removed or replaced meanwhile."""

    def __init__(
        self,
        path: Path | None,
        *,
        format: int,
        schema: Sequence[str],
        upgrades: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        """path:    the file; None keeps the database in memory.
        format:    number of the schema; a file with another number is refused.
        schema:    statements that make the tables and indices of a new database.
        upgrades:  older format -> statements that lead to the next one; done as one change when the file is opened."""
        self._path: Final = path
        self._lock = threading.Lock()  # SQLite's own lock makes waiters sleep and poll
        self._memory = sqlite3.connect(":memory:", check_same_thread=False)
        _fill(self._memory, format, schema)
        if path is None:
            return
        with closing(self._memory) as memory:
            expected = set(memory.execute(SHAPE))
        self._file: int | None = None
        with self._state_errors():
            if not path.exists():
                _make(path, format, schema)
                logger.info("%s is new: nothing is remembered in it yet", path)
            self._file = _hold(self, path)
        with self.transaction() as database:
            _upgrade(database, path, format, upgrades or {})
            _check(database, format, expected)
        try:
            with self.transaction() as database:
                database.execute(f"PRAGMA user_version = {format}")  # changes nothing, but has to be written
        except StateError as exc:
            logger.error("%s; what it holds is used, changes are not saved", exc)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction: all of it is written, or nothing."""
        with self._state_errors(), self._lock:
            if self._path is None:
                with self._memory:
                    yield self._memory
                return
            # Mode rw never makes a file. It reads a file that is write-protected.
            uri = f"{self._path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(uri, uri=True, timeout=TIMEOUT_S)) as database, database:
                self.check()
                database.execute("PRAGMA synchronous = EXTRA")  # FULL may lose the last change when the power fails
                database.execute("PRAGMA temp_store = MEMORY")  # sorting must not need room on a disk
                yield database

    @contextmanager
    def copy(self) -> Iterator[sqlite3.Connection]:
        """Run the block with a copy of the database in memory. Nothing that the block changes is kept."""
        with closing(sqlite3.connect(":memory:")) as memory:
            with self.transaction() as database:
                database.backup(memory)
            yield memory

    def check(self) -> None:
        """Raise StateError where the path no longer leads to the file that was opened. Cheap."""
        if self._path is None or self._file is None:
            return
        try:
            if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                return
        except OSError:
            pass
        raise StateError(
            f"{self._path}: was removed or replaced while the server runs",
            remedy="put the file back, or restart the server: it then starts from what the --state-dir holds",
        )

    @contextmanager
    def _state_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as exc:
            self.check()  # a better reason, if there is one
            path = self._path or "memory"
            raise StateError(f"{path}: cannot be read or written: {exc}", remedy=_remedy(exc)) from None


@contextmanager
def state_errors(effect: str) -> Iterator[None]:
    """Log a database's error, and raise it with the effect before it: what the error means for the client."""
    try:
        yield
    except StateError as exc:
        logger.error("%s: %s", effect, exc)
        raise StateError(f"{effect}: {exc.message}", remedy=exc.remedy) from None


def _fill(database: sqlite3.Connection, format: int, schema: Sequence[str]) -> None:
    database.execute(f"PRAGMA user_version = {format}")
    for statement in schema:
        database.execute(statement)


def _make(path: Path, format: int, schema: Sequence[str]) -> None:
    """Make a new database under another name first. A kill meanwhile leaves no empty file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with closing(sqlite3.connect(new)) as database:
            _fill(database, format, schema)
        try:
            os.link(new, path)  # unlike a rename, never replaces the file of a server that starts at the same time
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            new.rename(path)
    finally:
        for rest in (new, new.with_name(f"{new.name}-journal")):
            rest.unlink(missing_ok=True)


def _upgrade(database: sqlite3.Connection, path: Path, format: int, upgrades: Mapping[int, Sequence[str]]) -> None:
    """Bring a file of an older format to `format`."""
    [(found,)] = database.execute("PRAGMA user_version")
    if found not in upgrades:
        return
    database.execute("BEGIN")  # Python's sqlite3 begins none before statements that change a schema
    for number in range(found, format):
        for statement in upgrades[number]:
            database.execute(statement)
    database.execute(f"PRAGMA user_version = {format}")
    logger.info("%s is brought from format %d to %d", path, found, format)


def _hold(owner: object, path: Path) -> int:
    """Return a descriptor that lives as long as `owner`, so that no other file gets the same inode number. O_PATH:
    closing any other descriptor would release SQLite's locks."""
    file = os.open(path, getattr(os, "O_PATH", os.O_RDONLY))
    weakref.finalize(owner, os.close, file)
    return file


def _check(database: sqlite3.Connection, format: int, expected: set[tuple[str, str, str]]) -> None:
    """Raise sqlite3.DatabaseError if the file is damaged, or is another database than the one that was written."""
    problem = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise sqlite3.DatabaseError(f"it is damaged: {problem.splitlines()[-1]}")
    found = set(database.execute(SHAPE))
    if not found:
        raise sqlite3.DatabaseError("it is empty, although Loraplex never leaves it so")
    [(number,)] = database.execute("PRAGMA user_version")
    if number != format:
        raise sqlite3.DatabaseError(f"it has format {number}, this version knows {format}")
    if missing := sorted(expected - found):
        raise sqlite3.DatabaseError(f"it is another database, without {' '.join(filter(None, missing[0]))}")


def _remedy(exc: Exception) -> str:
    code = getattr(exc, "sqlite_errorname", "")
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "end the other program that has the file open"
    if isinstance(exc, OSError) or code.startswith(
        ("SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY")
    ):
        return "make the --state-dir a folder that can be written, free space on its disk, or give another --state-dir"
    return "restore the file from a backup, or move it away to begin without it, or give another --state-dir"
