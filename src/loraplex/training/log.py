"""The log of a run: a CSV file with a row for each step, and the same for TensorBoard where it is installed."""

import csv
from collections.abc import Sequence as Seq
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraplex.training.fit import Told
from loraplex.training.output import writing

LOG = "log.csv"
OF_STEP = ("step", "epoch", "learning_rate", "tokens_per_s", "seconds", "peak_bytes")
OF_DEV = ("f1", "auc", "accuracy", "log_loss")


class Log:
    """Writes the rows of a run. Those of another run in the same folder are replaced, but for those that a resumed run
    goes on from."""

    def __init__(self, folder: Path, names: Seq[str], first_step: int) -> None:
        """names: the classifiers'. first_step: the last step that is there already. Raises ConfigurationError where the
        folder cannot be written."""
        self._names, self._path = names, folder / LOG
        columns = [*OF_STEP, *(f"{name} {what}" for name in names for what in ("loss", *OF_DEV))]
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            kept = self._rows(columns, first_step) if first_step and self._path.is_file() else []
            self._file = self._path.open("w", newline="", encoding="utf-8")
            self._csv = csv.DictWriter(self._file, columns, extrasaction="ignore")
            self._csv.writeheader()
            self._csv.writerows(kept)
            self._file.flush()
        self._board: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def _rows(self, columns: Seq[str], last_step: int) -> list[dict[str, str]]:
        """Return the rows up to a step, but for those that are not whole, as after a power cut; none where the file is
        another run's."""
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # the last is cut short
        found = [cells for line in lines if (cells := _cells(line)) is not None]
        if found[:1] != [list(columns)]:
            return []
        rows = [dict(zip(columns, cells, strict=True)) for cells in found[1:] if len(cells) == len(columns)]
        return [row for row in rows if row["step"].isdecimal() and int(row["step"]) <= last_step]

    def step(self, told: Told) -> None:
        """Write a step's row. Raises ConfigurationError where the disk is full."""
        row: dict[str, float | None] = {
            "step": told.step,
            "epoch": round(told.epoch, 4),
            "learning_rate": told.learning_rate,
            "tokens_per_s": round(told.num_tokens / told.seconds, 1),
            "seconds": round(told.seconds, 4),
            "peak_bytes": told.peak_bytes,
        }
        for name, loss in zip(self._names, told.losses, strict=True):
            row[f"{name} loss"] = loss
        for name, quality in zip(self._names, told.quality or (), strict=told.quality is not None):
            for what in OF_DEV if quality is not None else ():
                row[f"{name} {what}"] = getattr(quality, what)
        with writing(self._path):
            self._csv.writerow(row)
            self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if value is not None:
                    self._board.add_scalar(key.replace(" ", "/"), value, told.step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _cells(line: str) -> list[str] | None:
    """Return the cells of a line; None where it is no line of a CSV file."""
    if "\0" in line:
        return None
    try:
        return next(csv.reader([line]), None)
    except csv.Error:
        return None
