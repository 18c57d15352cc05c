"""A database that is damaged, replaced, removed or not writable: nothing that it held is forgotten in silence."""

import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from loraplex.database import Database
from loraplex.errors import StateError

SCHEMA = ("CREATE TABLE IF NOT EXISTS words (word TEXT) STRICT", "CREATE INDEX IF NOT EXISTS by_word ON words (word)")


def opened(path: Path) -> Database:
    return Database(path, format=3, schema=SCHEMA)


def add(database: Database, *words: str) -> None:
    with database.transaction() as connection:
        connection.executemany("INSERT INTO words VALUES (?)", [(word,) for word in words])


def words(database: Database) -> list[str]:
    with database.transaction() as connection:
        return [word for (word,) in connection.execute("SELECT word FROM words ORDER BY rowid")]


@contextmanager
def no_room() -> Iterator[None]:
    """Let no file of this process grow: SQLite can write neither a page nor its journal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_new_database_is_whole_and_leaves_no_other_file(tmp_path: Path) -> None:
    add(opened(tmp_path / "made" / "x.sqlite"), "a")
    assert words(opened(tmp_path / "made" / "x.sqlite")) == ["a"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["x.sqlite"]


def test_an_emptied_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    add(opened(path), "a")
    path.write_bytes(b"")
    with pytest.raises(StateError, match=r"x\.sqlite.*empty.*restore.*move it away.*--state-dir"):
        opened(path)
    assert path.read_bytes() == b""


def test_two_that_begin_at_once_use_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.sqlite"
    first = opened(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self: False)  # the second looked before the first had made the file
        second = opened(path)
    add(first, "a")
    add(second, "b")
    assert words(first) == words(second) == ["a", "b"]


@pytest.mark.parametrize(
    "schema",
    [SCHEMA[1:], ("CREATE TABLE words (other TEXT)",), ("CREATE TABLE other (word TEXT)",), SCHEMA[:1]],
    ids=["no table", "another column", "another table", "no index"],
)
def test_another_database_in_its_place_is_refused_and_left_alone(tmp_path: Path, schema: tuple[str, ...]) -> None:
    path = tmp_path / "x.sqlite"
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 3")
        for statement in schema if schema != SCHEMA[1:] else ():
            other.execute(statement)
    before = path.read_bytes()
    with pytest.raises(StateError, match=r"x\.sqlite.*restore"):
        opened(path)
    assert path.read_bytes() == before


def test_damage_in_the_middle_is_found_when_the_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    add(opened(path), *(f"{i:0100}" for i in range(1000)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"x\.sqlite.*damaged.*restore"):
        opened(path)


def test_a_folder_that_is_removed_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    database = opened(folder / "x.sqlite")
    add(database, "a")
    folder.rename(tmp_path / "aside")
    for _ in range(2):
        with pytest.raises(StateError, match=r"removed or replaced.*put .* back.*restart"):
            words(database)
        with pytest.raises(StateError, match="removed or replaced"):
            add(database, "b")
        assert not folder.exists()
    (tmp_path / "aside").rename(folder)
    add(database, "c")
    assert words(database) == words(opened(folder / "x.sqlite")) == ["a", "c"]


def test_the_database_of_a_newer_server_in_its_place_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    database = opened(folder / "x.sqlite")
    add(database, "a")
    kept = folder.rename(tmp_path / "aside")  # keeps its inode in use, as an open file of a deleted folder does
    newer = opened(folder / "x.sqlite")
    add(newer, "n")
    with pytest.raises(StateError, match="removed or replaced"):
        add(database, "b")
    assert words(newer) == ["n"]
    shutil.rmtree(kept)


def test_where_no_room_is_left_what_is_there_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.sqlite"
    add(opened(path), "a")
    with no_room():
        database = opened(path)
        assert words(database) == ["a"]
        with pytest.raises(StateError, match=r"cannot be read or written.*free space"):
            add(database, "b")
        assert words(database) == ["a"]
        with pytest.raises(StateError, match=r"cannot be read or written.*free space"):
            opened(tmp_path / "new.sqlite")
    assert "x.sqlite" in caplog.text and "not saved" in caplog.text
    assert [one.name for one in tmp_path.iterdir()] == ["x.sqlite"]
    add(database, "c")
    assert words(opened(path)) == ["a", "c"]


def test_an_older_format_is_upgraded_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "kept.sqlite"
    old = Database(path, format=1, schema=["CREATE TABLE things (name TEXT) STRICT"])
    with old.transaction() as database:
        database.execute("INSERT INTO things VALUES ('first')")
    schema = ["CREATE TABLE things (name TEXT, colour TEXT) STRICT", "CREATE INDEX by_colour ON things (colour)"]
    upgrades = {1: ["ALTER TABLE things ADD COLUMN colour TEXT"], 2: [schema[1]]}
    for _ in range(2):  # the second time there is nothing to do
        new = Database(path, format=3, schema=schema, upgrades=upgrades)
        with new.transaction() as database:
            assert database.execute("SELECT * FROM things").fetchall() == [("first", None)]
    with pytest.raises(StateError, match="format 3, this version knows 1"):
        Database(path, format=1, schema=["CREATE TABLE things (name TEXT) STRICT"])


def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kept.sqlite"
    schema = ["CREATE TABLE things (name TEXT) STRICT"]
    Database(path, format=1, schema=schema)
    before = path.read_bytes()
    with pytest.raises(StateError, match="no such table"):
        Database(
            path, format=2, schema=schema, upgrades={1: ["ALTER TABLE things ADD COLUMN b TEXT", "DROP TABLE missing"]}
        )
    assert path.read_bytes() == before
    Database(path, format=1, schema=schema)
