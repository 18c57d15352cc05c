"""Kept texts as training data: a row for each conversation, as `labelled.py` reads it."""

import gzip
import json
import os
import sys
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from loraplex.errors import ConfigurationError
from loraplex.labelled import CONVERSATION_ID, EXPORTED
from loraplex.types import Example

YES_NO: dict[str, bool | str] = {"yes": True, "no": False}  # as people write them


def rows_of(found: Iterable[Example]) -> list[dict[str, Any]]:
    """Return a row for each conversation, in the order in which the conversations first came. Requests with the same
    conversation are merged: a label that feedback gave wins over an answer, and a later label over an earlier one.

    A row has `text` or `messages`, `labels`, the first `conversation_id` that a request gave, and the requests' ids in
    `ids`. By these `loraplex train` knows that the text must not stay in a contract."""
    rows: dict[str, dict[str, Any]] = {}
    corrected: set[tuple[str, str]] = set()  # (conversation, classifier)
    for one in found:
        key = "text" if isinstance(one.input, str) else "messages"
        conversation = json.dumps(one.input)
        row = rows.setdefault(conversation, {key: one.input, "labels": {}, EXPORTED: []})
        row[EXPORTED].append(one.id)
        if one.conversation_id is not None:
            row.setdefault(CONVERSATION_ID, one.conversation_id)
        for name, label in one.labels.items():
            if name in one.corrected or (conversation, name) not in corrected:
                row["labels"][name] = YES_NO.get(label.strip(), label.strip())
        corrected.update((conversation, name) for name in one.corrected)
    for row in rows.values():
        row["labels"] = dict(sorted(row["labels"].items()))
    return list(rows.values())


def check_file(out: Path) -> None:
    """Raise ConfigurationError where rows cannot be written to this file, or a file is there already."""
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigurationError(
            f"--out {out}", "is no .jsonl and no .jsonl.gz file", remedy=f"write --out {out.stem or 'corrected'}.jsonl"
        )
    if out.exists():
        raise ConfigurationError(f"--out {out}", "is there already", remedy="name another file, or remove this one")


def write_rows(rows: Seq[dict[str, Any]], out: Path | None) -> None:
    """Write rows as JSON lines: to a new file that only its owner may read, or to standard output."""
    written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if out is None:
        sys.stdout.buffer.write(written)
        sys.stdout.buffer.flush()
        return
    try:
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(gzip.compress(written, mtime=0) if out.suffix == ".gz" else written)
    except OSError as exc:
        raise ConfigurationError(
            f"--out {out}", f"cannot be written: {exc.strerror or exc}", remedy="name another file"
        ) from None
