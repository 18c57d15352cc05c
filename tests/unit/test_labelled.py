"""Conversations with labels are read whole, or every line that cannot be is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.errors import ConfigurationError
from loraplex.labelled import hard_label, read_labelled
from loraplex.types import Message


def save(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_all_three_forms_are_read(tmp_path: Path) -> None:
    rows = (
        {"id": 7, "conversation": "Customer: Bye!", "labels": {"done": True, "mood": "calm"}},
        "",
        {"text": "Hello", "labels": {"mood": {"calm": 0.75, "angry": 0.25}}},
        {"messages": [{"role": "user", "content": "Hi"}]},
    )
    first, second, third = read_labelled(save(tmp_path / "a.jsonl", *rows))
    assert (first.line, first.input, dict(first.labels)) == (1, "Customer: Bye!", {"done": True, "mood": "calm"})
    assert second.line == 3 and dict(second.labels) == {"mood": {"calm": 0.75, "angry": 0.25}}
    assert third.input == (Message(role="user", content="Hi"),) and not third.labels
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    assert read_labelled(tmp_path / "a.jsonl.gz") == (first, second, third)


def test_one_classifier_needs_no_name_in_the_file(tmp_path: Path) -> None:
    rows = (
        {"text": "a", "label": True},
        {"item": "b", "label": "calm"},
        {"text": "c", "label": None},
        {"text": "d"},
        {"text": "e", "item": 17, "label": "x", "labels": {"other": "y"}},
        {"text": "f", "label": {"calm": 0.5, "angry": 0.5}},
    )
    path = save(tmp_path / "a.jsonl", *rows)
    found = read_labelled(path, classifier="mood")
    assert [one.input for one in found] == list("abcdef")
    shares = {"calm": 0.5, "angry": 0.5}
    assert [dict(one.labels) for one in found] == [
        {"mood": True},
        {"mood": "calm"},
        {},
        {},
        {"other": "y"},
        {"mood": shares},
    ]
    assert not any(one.labels for one in read_labelled(path) if one.input != "e")
    with pytest.raises(ConfigurationError, match="line 1: 'mood' has true or false"):
        read_labelled(path, {"mood": ("calm", "angry")}, "mood")


def test_every_malformed_line_is_named(tmp_path: Path) -> None:
    secret = "a secret of the customer " * 100
    rows = [
        "{",
        {"text": "fine"},
        {"labels": {}},
        {"text": "a", "conversation": "b"},
        {"text": 3},
        {"text": " "},
        {"messages": secret},
        {"messages": [{"role": "user", "content": {"said": secret}}]},
        {"text": "a", "labels": [1]},
        {"text": "a", "labels": {"done": 1}},
        {"text": "a", "labels": {"done": {"yes": 0.5, "no": 0.1}}},
        {"text": "a", "labels": {"done": "maybe"}},
        "[1]",
        "{",
        "{",
    ]
    with pytest.raises(ConfigurationError) as caught:
        read_labelled(save(tmp_path / "a.jsonl", *rows), {"done": ("yes", "no")})
    message = caught.value.message
    for told in (
        "lines 1, 14-15: is not JSON",
        "line 3: has no text: give one of 'conversation', 'text', 'messages', 'item'",
        "line 4: has 'conversation', 'text'",
        "line 5: 'text' is a int",
        "line 6: 'text' is empty",
        "line 7: 'messages' is a str",
        "line 8: messages.0.content",
        "line 9: 'labels' is a list",
        "lines 10-11: the label of 'done' is no label",
        "line 12: label 'maybe' of 'done'",
        "line 13: is a list",
    ):
        assert told in message
    assert "line 2:" not in message and secret not in message and len(message) < 2000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("none.jsonl", None),
        ("a.jsonl.gz", b"text"),
        ("a.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9]),
    ],
)
def test_a_file_without_rows_is_an_error(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=name):
        read_labelled(tmp_path / name)


def test_bytes_that_are_no_text_are_an_error_of_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ConfigurationError, match="line 1: is not UTF-8"):
        read_labelled(tmp_path / "a.jsonl")


def test_true_and_false_stand_for_yes_and_no() -> None:
    assert hard_label(True, ("no", "Yes")) == "Yes"
    assert hard_label(False, (" true", "false")) == "false"
    assert hard_label({"calm": 0.4, "angry": 0.6}, ("calm", "angry")) == "angry"
    with pytest.raises(ValueError, match="true or false"):
        hard_label(True, ("calm", "angry"), "mood")
