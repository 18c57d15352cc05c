"""Stores all revisions of all routes. A route's newest revision that was not rolled back is in effect."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from loraplex.config import RouteSettings
from loraplex.database import Database
from loraplex.errors import NoRevisionError, UnknownRouteError
from loraplex.types import Route

FORMAT = 1
SCHEMA = (
    """
    CREATE TABLE IF NOT EXISTS revisions (
        revision INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        settings TEXT,  -- JSON; NULL: deleted
        is_from_file INTEGER NOT NULL,
        is_undone INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    "CREATE INDEX IF NOT EXISTS by_name ON revisions (name, is_undone, revision)",
)
MAX_REVISIONS = 100  # kept for each route
IN_EFFECT = "SELECT max(revision) FROM revisions WHERE NOT is_undone GROUP BY name"


class RouteStore:
    """Routes in a SQLite file. A change is written before it takes effect. Any thread may call. Every method raises
    StateError if the file cannot be read or written."""

    def __init__(self, path: Path | None = None) -> None:
        """path: a SQLite file; None keeps the routes in memory, until the process ends."""
        self._database = Database(path, format=FORMAT, schema=SCHEMA)
        self.routes()  # settings that cannot be read are an error now, and not after the base was loaded

    def routes(self) -> dict[str, Route]:
        """Return the routes in effect, by name, from the oldest revision to the newest."""
        with self._database.transaction() as database:
            return {route.name: route for route in _in_effect(database)}

    def put(self, name: str, settings: RouteSettings) -> Route:
        """Add a revision that sets the route, and return the route."""
        with self._database.transaction() as database:
            return _route(name, _append(database, name, settings), _json(settings))

    def delete(self, name: str) -> None:
        """Add a revision that deletes the route. Raises UnknownRouteError if there is no such route."""
        with self._database.transaction() as database:
            if not any(route.name == name for route in _in_effect(database)):
                raise UnknownRouteError(name)
            _append(database, name, None)

    def before(self, name: str) -> Route:
        """Return the route that a rollback would restore. Raises NoRevisionError if there is none."""
        with self._database.transaction() as database:
            rows = database.execute(
                "SELECT revision, settings FROM revisions WHERE name = ? AND NOT is_undone"
                " ORDER BY revision DESC LIMIT 1 OFFSET 1",
                (name,),
            ).fetchall()
            for revision, settings in rows:
                if settings is not None:
                    return _route(name, revision, settings)
        raise NoRevisionError(name)

    def rollback(self, name: str) -> Route:
        """Undo the last change of a route, and return the restored route. Raises NoRevisionError if there is nothing to
        restore."""
        before = self.before(name)
        with self._database.transaction() as database:
            database.execute(
                "UPDATE revisions SET is_undone = 1 WHERE revision > ? AND name = ?", (before.revision, name)
            )
        return before

    def read_file(self, routes: Mapping[str, RouteSettings]) -> None:
        """Apply the routes of `loraplex.yaml`. Only routes that changed since the file was last read get a new
        revision. So a restart does not undo a change made at run time."""
        with self._database.transaction() as database:
            last = dict(
                database.execute(
                    "SELECT name, settings FROM revisions WHERE revision IN"
                    " (SELECT max(revision) FROM revisions WHERE is_from_file GROUP BY name)"
                ).fetchall()
            )
            for name, settings in routes.items():
                if last.get(name) != _json(settings):
                    _append(database, name, settings, is_from_file=True)
            for name, settings in last.items():
                if settings is not None and name not in routes:
                    _append(database, name, None, is_from_file=True)


def _append(
    database: sqlite3.Connection, name: str, settings: RouteSettings | None, *, is_from_file: bool = False
) -> int:
    """Add a revision, and return its number. `settings` None deletes the route."""
    added = database.execute(
        "INSERT INTO revisions (name, settings, is_from_file) VALUES (?, ?, ?)",
        (name, None if settings is None else _json(settings), is_from_file),
    )
    assert added.lastrowid is not None
    database.execute(
        "DELETE FROM revisions WHERE name = ?1 AND NOT is_from_file AND revision <="
        " (SELECT revision FROM revisions WHERE name = ?1 ORDER BY revision DESC LIMIT 1 OFFSET ?2)",
        (name, MAX_REVISIONS),
    )
    return added.lastrowid


def _in_effect(database: sqlite3.Connection) -> list[Route]:
    rows = database.execute(
        f"SELECT name, revision, settings FROM revisions WHERE revision IN ({IN_EFFECT}) AND settings IS NOT NULL"
        " ORDER BY revision"
    )
    return [_route(*row) for row in rows]


def _route(name: str, revision: int, settings: str) -> Route:
    try:
        read = RouteSettings.model_validate_json(settings)
    except ValidationError:
        raise sqlite3.DatabaseError(f"the settings of the route {name!r} are damaged") from None
    return Route(name=name, targets=read.targets, shadows=read.shadows, revision=revision)


def _json(settings: RouteSettings) -> str:
    return settings.model_dump_json()
