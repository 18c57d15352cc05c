"""Kept texts: what is kept, for how long, and that nothing of it is left when its time is over."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from loraplex.cli.examples import check_file, rows_of, write_rows
from loraplex.config import ServerConfig, validate
from loraplex.errors import ConfigurationError, InvalidRequestError, StateError
from loraplex.labelled import read_labelled
from loraplex.routing.kept_inputs import PAGE_BYTES, KeptInputs
from loraplex.routing.start import open_stores
from loraplex.routing.verdict_log import LoggedVerdict, VerdictLog
from loraplex.types import ClassifyRequest, Example, Message

HOUR = 3600.0
MOST = 10**6


class Clock:
    """Begins at a time of day."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "inputs" if request.param == "file" else None


def kept(folder: Path | None, clock: Clock, keep: str = "1h", max_bytes: int = MOST) -> KeptInputs:
    return KeptInputs(folder, keep=keep, max_bytes=max_bytes, clock=clock)


def add(inputs: KeptInputs, *ids: str, text: str = "text of {}") -> None:
    for id in ids:
        inputs.add(id, ClassifyRequest(input=text.format(id)))
    inputs.flush()


def everything(inputs: KeptInputs, since_s: float | None = None) -> list[str]:
    """The ids of all pages."""
    found, after = inputs.read(since_s, None)
    while after is not None:
        page, after = inputs.read(since_s, after)
        found += page
    return [one.id for one in found]


def bytes_of(inputs: KeptInputs, folder: Path | None) -> bytes:
    """All that there is, whatever is said to be in it."""
    if folder is None:
        return b"".join(bytes(part.content) for part in inputs._parts)
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")))


# ------------------------------------------------------------------------------------------------- time and size


def test_a_text_is_kept_for_its_time_and_not_longer(folder: Path | None, clock: Clock) -> None:
    inputs, came = kept(folder, clock), {}
    for number in range(300):
        id = f"<{number}>"
        came[id] = clock.now
        add(inputs, id)
        there, held = everything(inputs), bytes_of(inputs, folder)
        for one, at in came.items():
            assert (one.encode() in held) == (one in there)
            assert (one in there) or clock.now - at > HOUR * 11 / 12 - 120
            assert one not in there or clock.now - at < HOUR
        clock.now += 60 + number % 7 * 13
    assert there == list(came)[-len(there) :], "oldest first"
    clock.now += HOUR
    inputs.flush()
    assert everything(inputs) == [] and bytes_of(inputs, folder) == b""
    assert folder is None or list(folder.iterdir()) == []


def test_texts_go_without_traffic_and_before_their_time_is_over(folder: Path | None) -> None:
    inputs = KeptInputs(folder, keep="4s", max_bytes=MOST)
    inputs.start()
    try:
        began = time.time()
        inputs.add("x", ClassifyRequest(input="a secret"))
        until = time.monotonic() + 2.5
        while b"a secret" not in bytes_of(inputs, folder):
            assert time.monotonic() < until, "it is written soon"
            time.sleep(0.05)
        while b"a secret" in bytes_of(inputs, folder):
            time.sleep(0.05)
            assert time.time() < began + 4
    finally:
        inputs.close()


def test_the_disk_itself_holds_an_erased_text_no_more(tmp_path: Path, clock: Clock) -> None:
    """Another link to the file shows what its blocks hold after it was removed."""
    inputs = kept(tmp_path / "inputs", clock)
    add(inputs, "x", text="a secret {}")
    [file] = (tmp_path / "inputs").iterdir()
    os.link(file, tmp_path / "link")
    assert b"a secret" in (tmp_path / "link").read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600 and (tmp_path / "inputs").stat().st_mode & 0o777 == 0o700
    clock.now += HOUR
    inputs.flush()
    assert not file.exists() and set((tmp_path / "link").read_bytes()) == {0}


def test_beyond_the_size_the_oldest_go(folder: Path | None, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    inputs = kept(folder, clock, max_bytes=20_000)
    ids = [f"<{number}>" for number in range(500)]
    for id in ids:
        add(inputs, id, text="{}" + "x" * (len(id) * 40))
        assert len(bytes_of(inputs, folder)) <= 20_000
        clock.now += 0.1
    there = everything(inputs)
    assert there == ids[-len(there) :] and len(bytes_of(inputs, folder)) > 18_000
    assert caplog.text.count("--keep-inputs-bytes") == 1
    add(inputs, "large", text="x" * 20_000)
    assert everything(inputs) == there, "a text that can never fit erases no other"


def test_no_text_waits_that_cannot_be_written(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = kept(tmp_path / "inputs", clock)
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "open", full)
        for number in range(3):
            inputs.add(str(number), ClassifyRequest(input="x"))
            inputs.try_to_flush()
    assert not inputs._added and caplog.text.count("No space left") == 1
    add(inputs, "later")
    assert everything(inputs) == ["later"]
    inputs.try_to_flush()
    assert "are kept, and erased in time again" in caplog.text


def test_what_cannot_be_erased_is_told_and_erased_when_it_can(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = kept(tmp_path / "inputs", clock)
    add(inputs, "x")
    clock.now += HOUR
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(30, "Read-only file system")

        patch.setattr(os, "unlink", refuse)
        inputs.try_to_flush()
        assert "NOT ERASED IN TIME" in caplog.text and "Read-only" in caplog.text
        with pytest.raises(StateError, match=r"delete the folder .*inputs"):
            kept(tmp_path / "inputs", clock)
    inputs.try_to_flush()
    assert list((tmp_path / "inputs").iterdir()) == []


# ------------------------------------------------------------------------------------------------- restarts


def test_texts_survive_a_restart_and_keep_their_end(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "inputs"
    add(kept(folder, clock), "old")
    clock.now += 0.5 * HOUR
    longer = kept(folder, clock, keep="2h")
    add(longer, "new")
    assert everything(longer) == ["old", "new"]
    clock.now += 0.5 * HOUR
    assert everything(longer) == ["new"], "what was promised when it came holds"
    assert everything(kept(folder, clock, keep="10m")) == [], "and a shorter time holds for all"
    assert list(folder.iterdir()) == []


def test_texts_whose_time_ended_while_no_server_ran_go_first(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "inputs"
    add(kept(folder, clock), "x")
    clock.now += 30 * 24 * HOUR
    kept(folder, clock)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("keep", ["1h", "0"])
def test_a_clock_that_was_put_back_keeps_no_text_for_years(tmp_path: Path, clock: Clock, keep: str) -> None:
    folder = tmp_path / "inputs"
    add(kept(folder, clock), "x")
    clock.now -= 365 * 24 * HOUR
    kept(folder, clock, keep=keep)
    assert list(folder.iterdir()) == []


def test_a_start_without_the_option_erases_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, log = open_stores(str(tmp_path), max_verdicts=10, keep_inputs="7d", max_input_bytes=MOST)
    assert log is not None and log.inputs is not None
    assert "THE TEXTS OF ALL CLASSIFIED REQUESTS ARE STORED for 7d" in caplog.text and str(tmp_path) in caplog.text
    add(log.inputs, "x")
    log.close()
    assert any((tmp_path / "inputs").iterdir())
    caplog.clear()
    _, off = open_stores(str(tmp_path), max_verdicts=10)
    assert off is not None and off.inputs is None and not (tmp_path / "inputs").exists()
    assert "are erased, because --keep-inputs is off now" in caplog.text
    caplog.clear()
    open_stores(str(tmp_path), max_verdicts=10)
    assert caplog.text == ""


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "inputs"
    add(kept(folder, clock), "a", "b")
    [file] = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    again = kept(folder, clock)
    add(again, "c")
    assert everything(again) == ["a", "c"]


def test_a_folder_that_was_replaced_is_another_servers(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "inputs"
    inputs = kept(folder, clock)
    add(inputs, "before")
    folder.rename(tmp_path / "aside")
    other = kept(folder, clock)
    add(inputs, "after")
    assert everything(other) == [] and everything(inputs) == ["before", "after"]
    clock.now += HOUR
    inputs.flush()
    assert list((tmp_path / "aside").iterdir()) == [], "erased wherever it was moved to"
    (tmp_path / "aside").rmdir()
    inputs.add("lost", ClassifyRequest(input="x"))
    inputs.try_to_flush()
    assert "No such file" in caplog.text and not (tmp_path / "aside").exists()


# ------------------------------------------------------------------------------------------------- what is read


def test_pages_go_on_where_the_one_before_ended(folder: Path | None, clock: Clock) -> None:
    inputs = kept(folder, clock, max_bytes=100 * PAGE_BYTES)
    ids = [f"{number:02}" for number in range(40)]
    for id in ids:
        add(inputs, id, text="{}" + "x" * (PAGE_BYTES // 8))
        clock.now += 30
    pages: list[list[str]] = []
    after = None
    while not pages or after is not None:
        found, after = inputs.read(None, after)
        pages.append([one.id for one in found])
    assert [id for page in pages for id in page] == ids and len(pages) > 5
    assert everything(inputs, since_s=301) == ids[-10:]
    assert everything(inputs, since_s=1) == []
    _, after = inputs.read(None, None)
    clock.now += 0.75 * HOUR  # the first pages are erased meanwhile
    found, _ = inputs.read(None, after)
    assert found and found[0].id > "09"


@pytest.mark.parametrize("after", ["", "x", "1", "1.", "-1.0", "1.0.0", "9" * 400, "1.0\n"])
def test_a_place_that_is_none_is_refused(folder: Path | None, clock: Clock, after: str) -> None:
    with pytest.raises(InvalidRequestError, match="no page's"):
        kept(folder, clock).read(None, after)


def test_any_other_place_gives_whole_lines(folder: Path | None, clock: Clock) -> None:
    inputs = kept(folder, clock)
    add(inputs, "a", "b")
    began = inputs._parts[0].began_ms
    for offset in (0, 1, 50, 10**14):
        assert {one.id for one in inputs.read(None, f"{began}.{offset}")[0]} <= {"a", "b"}
    assert inputs.read(None, f"{began + 1}.0") == ([], None)


def test_messages_stay_messages_without_the_turns_that_the_request_leaves_out(
    folder: Path | None, clock: Clock
) -> None:
    inputs = kept(folder, clock)
    said = (
        Message(role="System", content="be brief"),
        Message(role="user", content="hello\r\nthere"),
        Message(role="bot", content="half a pair: \ud83d", name="b"),
    )
    inputs.add("m", ClassifyRequest(input=said, roles={"system": None, "bot": "Agent"}))
    [one] = inputs.read(None, None)[0]
    assert one.input == (
        {"role": "user", "content": "hello\r\nthere"},
        {"role": "bot", "content": "half a pair: ?", "name": "b"},
    )


# ------------------------------------------------------------------------------------------------- labels


def verdict(id: str, route: str, label: str | None = "yes", **values: Any) -> LoggedVerdict:
    found = LoggedVerdict(
        id=id,
        route=route,
        target="a",
        version="v1",
        is_shadow=False,
        label=label,
        confidence=0.5,
        latency_ms=1.0,
        error=None if label else "engine_error",
    )
    return found._replace(**values)


def test_labels_are_corrections_and_on_demand_answers(folder: Path | None, clock: Clock) -> None:
    log = VerdictLog(max_verdicts=100, inputs=kept(folder, clock))
    assert log.inputs is not None
    for id in ("cls-1", "cls-10", "cls-2", "cls-3"):
        log.inputs.add(id, ClassifyRequest(input=f"text {id}"))
    log.add(
        [
            verdict("cls-1-0", "done"),
            verdict("cls-1-0", "done", "no", target="b", is_shadow=True),
            verdict("cls-1-1", "fraud", "no"),
            verdict("cls-10-0", "done", "no"),
            verdict("cls-2-0", "done", None),
            verdict("cls-2-1", "fraud", "yes"),
            verdict("cls-3-0", "done", None),
        ]
    )
    log.set_truth("cls-1-0", "no")
    log.set_truth("cls-2-1", "yes")  # confirmed

    def found(names: Any, is_corrected: bool) -> dict[str, tuple[dict[str, str], tuple[str, ...]]]:
        page = log.examples(names, None, is_corrected, None)
        return {one.id: (dict(one.labels), one.corrected) for one in page.examples}

    assert found("*", True) == {
        "cls-1": ({"done": "no"}, ("done",)),
        "cls-2": ({"fraud": "yes"}, ("fraud",)),
    }
    assert found(("done",), False) == {"cls-1": ({"done": "no"}, ("done",)), "cls-10": ({"done": "no"}, ())}
    assert found("*", False)["cls-1"] == ({"done": "no", "fraud": "no"}, ("done",))
    assert found(("nobody",), False) == {}


def test_a_space_before_a_label_is_no_other_label() -> None:
    log = VerdictLog(max_verdicts=100)
    log.add([verdict("1", "r", " yes"), verdict("1", "r", "yes", target="b", is_shadow=True)])
    log.set_truth("1", "yes")
    answered, shadow = log.stats("r").targets
    assert shadow.agreement is not None and shadow.agreement.share == 1
    assert answered.accuracy is not None and answered.accuracy.share == 1


def example(id: str, input: Any, corrected: tuple[str, ...] = (), **labels: str) -> Example:
    return Example(id=id, input=input, labels=labels, corrected=corrected)


def test_requests_with_one_conversation_are_one_row(tmp_path: Path) -> None:
    turns = ({"role": "user", "content": "Danke, das wär's"},)
    rows = rows_of(
        [
            example("1", "hello", ("fraud",), fraud="yes", done="yes"),
            example("2", turns, mood=" calm"),
            example("3", "hello", fraud="no", done="no"),
            example("4", turns, ("done",), done="no"),
            example("5", "hello", ("fraud",), fraud=" no"),
        ]
    )
    assert rows == [
        {"text": "hello", "labels": {"done": False, "fraud": False}, "ids": ["1", "3", "5"]},
        {"messages": turns, "labels": {"done": False, "mood": "calm"}, "ids": ["2", "4"]},
    ]
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        write_rows(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        read = read_labelled(tmp_path / name, {"done": ("yes", "no")})
        assert [one.input for one in read] == ["hello", (Message(role="user", content="Danke, das wär's"),)]
        assert [dict(one.labels) for one in read] == [row["labels"] for row in rows]
    before = (tmp_path / "rows.jsonl.gz").read_bytes()
    with pytest.raises(ConfigurationError, match="is there already"):
        check_file(tmp_path / "rows.jsonl.gz")
    with pytest.raises(ConfigurationError, match="cannot be written: File exists"):
        write_rows(rows, tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.jsonl.gz").unlink()
    write_rows(rows, tmp_path / "rows.jsonl.gz")
    assert (tmp_path / "rows.jsonl.gz").read_bytes() == before
    with pytest.raises(ConfigurationError, match=r"is no .jsonl.*write --out rows.jsonl"):
        check_file(tmp_path / "rows.txt")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_rows(rows, tmp_path / "missing" / "rows.jsonl")


# ------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("given", ["0", 0, "0d", "0s"])
def test_off_is_off(given: Any) -> None:
    assert ServerConfig().keep_inputs == validate(ServerConfig, {"keep_inputs": given}, "x").keep_inputs == "0"


@pytest.mark.parametrize("given", ["7", 7, "forever", "-1d", "1.5d", "7 d", "12345d", True, ""])
def test_what_is_no_duration_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError):
        validate(ServerConfig, {"keep_inputs": given}, "x")


def test_texts_without_verdicts_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="keep_verdicts"):
        validate(ServerConfig, {"keep_inputs": "7d", "keep_verdicts": 0}, "x")


def test_a_line_is_json_of_its_own(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    add(kept(tmp_path / "inputs", clock), "x", text="a\nb\u2028c\x00 {}")
    [file] = (tmp_path / "inputs").iterdir()
    [line] = file.read_bytes().splitlines()
    assert json.loads(line) == {"id": "x", "at": round(clock.now * 1000), "input": "a\nb\u2028c\x00 x"}
    assert "a\\nb" not in caplog.text


def test_an_export_names_the_conversation_that_its_turns_are_of(
    folder: Path | None, clock: Clock, tmp_path: Path
) -> None:
    log = VerdictLog(max_verdicts=100, inputs=kept(folder, clock))
    assert log.inputs is not None
    for id, conversation in (("cls-1", "chat"), ("cls-2", "chat"), ("cls-3", None)):
        log.inputs.add(id, ClassifyRequest(input=f"text {id}", conversation_id=conversation))
        log.add([verdict(f"{id}-0", "done")])
    rows = rows_of(log.examples("*", None, False, None).examples)
    assert [row.get("conversation_id") for row in rows] == ["chat", "chat", None]
    write_rows(rows, tmp_path / "rows.jsonl")
    assert [row.conversation_id for row in read_labelled(tmp_path / "rows.jsonl")] == ["chat", "chat", None]
