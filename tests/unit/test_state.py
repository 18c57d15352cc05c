"""What a server remembers outlives it, however it ends."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex.errors import StateError
from loraplex.routing.route_store import RouteStore
from loraplex.service.state import AdapterState, Remembered

WRITER = """
import itertools, sys
from pathlib import Path
from loraplex.service.state import AdapterState
state = AdapterState(Path(sys.argv[1]))
for i in itertools.count():
    source = None if i % 3 == 2 else f"source {i}"
    state.remember(name=f"name-{i % 7}", source=source, is_pinned=i % 2 == 0)
    print(i, flush=True)
"""


def row(i: int) -> Remembered:
    return Remembered(name=f"name-{i % 7}", source=None if i % 3 == 2 else f"source {i}", is_pinned=i % 2 == 0)


@pytest.mark.parametrize("num_rows", [1, 8, 40])
def test_a_kill_loses_nothing_that_was_remembered(tmp_path: Path, num_rows: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(num_rows):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        seen = num_rows + len(writer.stdout.read().split())
    found = AdapterState(tmp_path).remembered()
    # One more may have come to pass that it did not live to tell.
    assert any(
        {one.name: one for one in found} == {row(i).name: row(i) for i in range(count)} for count in (seen, seen + 1)
    )
    AdapterState(tmp_path).remember(name="after", source="x", is_pinned=False)
    assert AdapterState(tmp_path).remembered() == (*found, Remembered(name="after", source="x", is_pinned=False))


def test_the_last_word_on_a_name_counts_and_names_keep_their_order(tmp_path: Path) -> None:
    state = AdapterState(tmp_path / "made" / "for it")
    for name, source, is_pinned in (("b", "1", False), ("a", "2", True), ("b", None, False), ("b", "3", True)):
        state.remember(name=name, source=source, is_pinned=is_pinned)
    expected = tuple(Remembered(name=name, source=source, is_pinned=True) for name, source in (("b", "3"), ("a", "2")))
    assert state.remembered() == AdapterState(tmp_path / "made" / "for it").remembered() == expected


def test_any_thread_of_several_servers_may_write(tmp_path: Path) -> None:
    states = [AdapterState(tmp_path) for _ in range(3)]

    def write(i: int) -> None:
        states[i % 3].remember(name=f"name-{i}", source=str(i), is_pinned=False)
        assert any(one.name == f"name-{i}" for one in states[(i + 1) % 3].remembered())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(60)))
    assert {one.name for one in states[0].remembered()} == {f"name-{i}" for i in range(60)}


def test_a_broken_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "loraplex.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(StateError, match=r"loraplex\.sqlite.*--state-dir"):
        AdapterState(tmp_path)


def test_a_file_that_breaks_later_is_our_error_too(tmp_path: Path) -> None:
    state = AdapterState(tmp_path)
    state.remember(name="a", source="b", is_pinned=True)
    content = (tmp_path / "loraplex.sqlite").read_bytes()
    for broken in (b"no database" * 500, content[:4096], content[:5000], b""):
        (tmp_path / "loraplex.sqlite").write_bytes(broken)
        with pytest.raises(StateError):
            state.remembered()
        with pytest.raises(StateError):
            state.remember(name="a", source="b", is_pinned=True)


@pytest.mark.parametrize("statement", ["CREATE TABLE adapters (other)", "PRAGMA user_version = 2"])
def test_a_database_of_another_make_is_left_alone(tmp_path: Path, statement: str) -> None:
    with sqlite3.connect(tmp_path / "loraplex.sqlite") as database:
        database.execute(statement)
    database.close()
    with pytest.raises(StateError):
        AdapterState(tmp_path)


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/loraplex")):
        with pytest.raises(StateError, match="--state-dir"):
            AdapterState(place)


@pytest.fixture
def unwritable() -> Iterator[Callable[[Path], None]]:
    """Takes the right to write a folder, until the test ends."""
    is_root = os.geteuid() == 0  # whom no permission stops: it becomes nobody, who may not enter pytest's folders
    taken: list[Path] = []

    def take(place: Path) -> None:
        taken.append(place)
        os.chmod(place, 0o555)
        if is_root:
            os.seteuid(65534)

    yield take
    if is_root:
        os.seteuid(0)
    for place in taken:
        os.chmod(place, 0o755)
        shutil.rmtree(place)


def test_a_new_state_in_a_folder_that_takes_no_writes_is_refused(unwritable: Callable[[Path], None]) -> None:
    place = Path(tempfile.mkdtemp())
    unwritable(place)
    with pytest.raises(StateError, match="--state-dir"):
        AdapterState(place)


def test_a_state_that_takes_no_writes_is_read(
    unwritable: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    place = Path(tempfile.mkdtemp())
    AdapterState(place).remember(name="a", source="b", is_pinned=False)
    unwritable(place)
    state = AdapterState(place)
    assert "loraplex.sqlite" in caplog.text and "not saved" in caplog.text
    state.acquire()
    assert [one.name for one in state.remembered()] == ["a"]
    with pytest.raises(StateError, match=r"readonly.*--state-dir"):
        state.remember(name="a", source=None, is_pinned=False)
    with pytest.raises(StateError, match="another server"):
        AdapterState(place).acquire()
    state.release()


def test_deleting_the_lock_file_lets_no_second_server_in(tmp_path: Path) -> None:
    first, second = AdapterState(tmp_path), AdapterState(tmp_path)
    first.acquire()
    (tmp_path / "loraplex.lock").unlink()
    with pytest.raises(StateError, match="another server"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_folder_that_is_made_again_belongs_to_the_server_that_made_it(tmp_path: Path) -> None:
    first = AdapterState(tmp_path / "state")
    first.acquire()
    first.remember(name="a", source="1", is_pinned=False)
    shutil.rmtree(tmp_path / "state")
    second = AdapterState(tmp_path / "state")
    second.acquire()
    second.remember(name="b", source="2", is_pinned=False)
    with pytest.raises(StateError, match="removed or replaced"):
        first.remember(name="a", source=None, is_pinned=False)
    first.release()
    with pytest.raises(StateError, match="another server"):
        AdapterState(tmp_path / "state").acquire()
    assert [one.name for one in second.remembered()] == ["b"]
    second.release()


def test_routes_in_the_place_of_adapters_are_refused(tmp_path: Path) -> None:
    RouteStore(tmp_path / "loraplex.sqlite")
    with pytest.raises(StateError, match="another database"):
        AdapterState(tmp_path)
