"""The state of a run on disk, from which an interrupted run goes on."""

import os
from pathlib import Path
from typing import Any

import torch

from loraplex.errors import ConfigurationError
from loraplex.training.output import writing


class State:
    """A file with the training loop's state, and what it belongs to."""

    def __init__(self, path: Path, identity: str) -> None:
        """identity: the same for the same data, classifiers, prompts and settings."""
        self._path, self._identity = path, identity

    def save(self, loop: dict[str, Any]) -> None:
        """Write the state in one piece. Raises ConfigurationError where it cannot be written; an older one stays."""
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
        if not self._path.is_file():
            raise ConfigurationError(
                "--resume",
                f"there is no {self._path}: no run was interrupted, or not after its first evaluation",
                remedy="leave out --resume to begin anew",
            )
        try:
            found: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
            identity, loop = found["identity"], found["loop"]
        except Exception as exc:  # pickle, zip and torch raise many types
            raise ConfigurationError(
                self._path, f"cannot be read: {type(exc).__name__}: {exc}", remedy="leave out --resume to begin anew"
            ) from None
        if identity != self._identity:
            raise ConfigurationError(
                "--resume",
                f"{self._path} belongs to other data or other settings",
                remedy="give the same data and options as before, or leave out --resume",
            )
        assert isinstance(loop, dict)
        return loop

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
