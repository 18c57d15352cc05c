"""Writes a measurement's files, which are whole or not there, and identifies the files that it read."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece. Its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON. A value that is no JSON (NaN, a tensor) raises: a report has figures only."""
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
