"""The state of a run on disk, from which an interrupted run goes on."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loraplex.errors import ConfigurationError
from loraplex.training.output import writing


class State:
    """A file with the training loop's state, and what it belongs to."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        """identity: what a resumed run must have in common with the interrupted one, by the names of an error."""
        self._path, self._identity = path, dict(identity)

    @property
    def is_there(self) -> bool:
        return self._path.is_file()

    def save(self, loop: dict[str, Any]) -> None:
        """Write the state in one piece, in the place of an older one. Raises ConfigurationError where it cannot be
        written; the older one stays then."""
        part = self._path.with_suffix(".part")
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.save({"identity": self._identity, "loop": loop}, part)
            except (OSError, RuntimeError) as exc:  # RuntimeError is what PyTorch makes of a full disk
                part.unlink(missing_ok=True)
                raise OSError(str(exc).partition("\n")[0]) from None
            os.replace(part, self._path)

    def load(self) -> dict[str, Any]:
        """Return the loop's state. Raises ConfigurationError where there is none, or it belongs to another run."""
        if not self.is_there:
            raise ConfigurationError(
                "--resume",
                f"there is no {self._path}: no run was interrupted, or not after its first evaluation",
                remedy="leave out --resume to begin anew",
            )
        anew = "--overwrite in place of --resume to begin anew"
        try:
            found: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
            identity, loop = found["identity"], found["loop"]
        except Exception as exc:  # pickle, zip and torch raise many types
            raise ConfigurationError(
                self._path, f"cannot be read: {type(exc).__name__}: {exc}", remedy=f"give {anew}"
            ) from None
        known = identity if isinstance(identity, dict) else {}  # an older version wrote a text
        keys = dict.fromkeys([*self._identity, *known])
        if other := [key for key in keys if known.get(key) != self._identity.get(key)]:
            raise ConfigurationError(
                "--resume",
                f"{self._path} belongs to a run with another {', another '.join(other)}",
                remedy=f"give what that run was given, or {anew}",
            )
        assert isinstance(loop, dict)
        return loop

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
