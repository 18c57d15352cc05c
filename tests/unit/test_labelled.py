"""Conversations with labels are read whole, or every line that cannot be is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.errors import ConfigurationError
from loraplex.labelled import hard_label, label_shares, read_labelled
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
        {"text": "a", "labels": {"done": {"yes": float("nan"), "no": 1}}},
        {"text": "a", "labels": {"done": {"yes": 7, "no": 3}}},
        {"text": "a", "labels": {"done": {"yes": -0.5, "no": 1}}},
        {"text": "a", "labels": {"done": {}}},
        {"text": "a", "labels": {"done": " "}},
        {"text": "a", "labels": {"done": ["yes"]}},
        '{"text": "a", "labels": {"done": true, "done": false}}',
        {"text": "a", "labels": {"done": "maybe"}},
        "[1]",
        "{",
        "{",
    ]
    with pytest.raises(ConfigurationError) as caught:
        read_labelled(save(tmp_path / "a.jsonl", *rows), {"done": ("yes", "no")})
    message = caught.value.message
    for told in (
        "lines 1, 21-22: is not JSON: expecting property name enclosed in double quotes at column 2",
        "line 3: has no text: give one of 'conversation', 'text', 'messages', 'item'",
        "line 4: has 'conversation', 'text'",
        "line 5: 'text' is a int",
        "line 6: 'text' is empty",
        "line 7: 'messages' is a str",
        "line 8: messages.0.content",
        "line 9: 'labels' is a list",
        "line 10: the label of 'done' is 1, a number: write true or false",
        "line 11: the label of 'done' has shares that sum to 0.6, not to 1",
        "line 12: the label of 'done' gives 'yes' a share of NaN",
        "line 13: the label of 'done' gives 'yes' a share of 7",
        "line 14: the label of 'done' gives 'yes' a share of -0.5",
        "line 15: the label of 'done' has shares that sum to 0,",
        "line 16: the label of 'done' is empty",
        "line 17: the label of 'done' is a list",
        "line 18: has 'done' twice",
        "line 19: label 'maybe' of 'done'",
        "line 20: is a list",
    ):
        assert told in message
    assert "line 2:" not in message and secret not in message and len(message) < 3000


def test_many_kinds_of_faults_are_told_shortly_and_all_lines_are_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "labels": {"done": f"label {number}"}} for number in range(500)]
    with pytest.raises(ConfigurationError, match="lines 21-500: more of this kind") as caught:
        read_labelled(save(tmp_path / "a.jsonl", *rows), {"done": ("yes", "no")})
    assert "line 1: label 'label 0'" in caught.value.message and len(caught.value.message) < 3000


def test_new_classifiers_have_possible_names_and_labels_that_are_written_in_one_way(tmp_path: Path) -> None:
    rows = [
        *[{"text": "a", "labels": {"done": "yes", "mood": "calm", "rude": True, "kind": "A b"}}] * 3,
        {"text": "a", "labels": {"done": "Yes "}},
        {"text": "a", "labels": {"done": "true", "mood": True}},
        {"text": "a", "labels": {"rude": "maybe", "kind": {"a  B": 0.5, "c": 0.5}}},
        {"text": "a", "labels": {"../evil": True, "": True}},
        {"text": "a", "labels": {"a/b": True}},
        {"text": "a", "label": True},
        {"text": "a", "labels": {"done": True, "rude": "no"}},
    ]
    path = save(tmp_path / "a.jsonl", *rows)
    with pytest.raises(ConfigurationError) as caught:
        read_labelled(path, option="--classifier", new=())
    for told in (
        "line 4: label 'Yes' of 'done' is 'yes' elsewhere: write one of them",
        "line 5: label 'true' of 'done' is 'yes' elsewhere",
        "line 5: the label of 'mood' is true or false, and elsewhere a name",
        "line 6: the label of 'rude' is a name other than yes and no, and elsewhere true or false",
        "line 6: label 'a  B' of 'kind' is 'A b' elsewhere",
        "line 7: '../evil' cannot name a classifier",
        "line 8: 'a/b' cannot name a classifier",
        "line 9: has a 'label' for no classifier: give one --classifier NAME",
    ):
        assert told in caught.value.message
    assert "lines 1" not in caught.value.message and "10" not in caught.value.message
    assert len(read_labelled(path)) == 10, "conversations that only stand for load may have any labels"
    with pytest.raises(ConfigurationError) as caught:
        read_labelled(path, option="--classifier", new=("mood",))
    assert "evil" not in caught.value.message and "rude" not in caught.value.message


def test_spaces_around_labels_do_not_count(tmp_path: Path) -> None:
    rows = [{"text": "a", "labels": {"mood": "calm "}}, {"text": "a", "labels": {"mood": {" calm": 0.5, "angry": 0.5}}}]
    first, second = read_labelled(save(tmp_path / "a.jsonl", *rows), {"mood": (" calm", " angry")})
    assert first.labels["mood"] == "calm" and hard_label("calm", (" angry", " calm")) == " calm"
    assert label_shares(second.labels["mood"], (" angry", " calm"), "mood") == {0: 0.5, 1: 0.5}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", "\ufeff" + '{"text": "a"}\n'),
        ("packed.jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0)),
        ("plain.jsonl.gz", '{"text": "a"}\n'),
    ],
)
def test_a_file_is_read_by_what_it_holds(tmp_path: Path, name: str, content: str | bytes) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [one.input for one in read_labelled(tmp_path / name)] == ["a"]


def test_what_is_no_file_in_utf_8_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "wide.jsonl").write_text('{"text": "a"}\n', encoding="utf-16")
    with pytest.raises(ConfigurationError, match=r"is written in UTF-16 \(save it as UTF-8"):
        read_labelled(tmp_path / "wide.jsonl")
    for path, told in (
        (tmp_path, "is a folder"),
        (Path("-"), "no such file.*not standard input"),
        (Path("x" * 300), "no such"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            read_labelled(path)


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
    with pytest.raises(ConfigurationError, match="line 1: is not UTF-8 at byte 11"):
        read_labelled(tmp_path / "a.jsonl")


def test_true_and_false_stand_for_yes_and_no() -> None:
    assert hard_label(True, ("no", "Yes")) == "Yes"
    assert hard_label(False, (" true", "false")) == "false"
    assert hard_label({"calm": 0.4, "angry": 0.6}, ("calm", "angry")) == "angry"
    with pytest.raises(ValueError, match="true or false"):
        hard_label(True, ("calm", "angry"), "mood")


def test_a_conversation_s_id_is_text_or_a_number(tmp_path: Path) -> None:
    rows = [{"text": "a", "conversation_id": one} for one in ("x", 7, None)]
    assert [one.conversation_id for one in read_labelled(save(tmp_path / "a.jsonl", *rows))] == ["x", "7", None]
    with pytest.raises(ConfigurationError, match="line 1: 'conversation_id' is a list"):
        read_labelled(save(tmp_path / "b.jsonl", {"text": "a", "conversation_id": []}))
