"""Writes a measurement's files, which are whole or not there, and identifies the files that it read."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str, *, is_private: bool = False) -> None:
    """Write a file in one piece. Its folder is made where it is missing. A file that is there keeps its permissions,
    and a link leads to the new file as it led to the old one.

    is_private:  whether only its owner may read a new file."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if is_private else 0o666), "wb") as file:
        if path.exists():
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        file.write(text.encode())
    os.replace(part, path)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON. A value that is no JSON (NaN, a tensor) raises: a report has figures only."""
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
