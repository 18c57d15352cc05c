"""Says what an interrupted run and the run that goes on with it must have in common."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from loraplex.training.prepared import Prepared
from loraplex.training.settings import TrainSettings

# They do not change what a step computes, but for rounding, or count after the training only. `select` is none of them:
# the state holds the best figures so far.
FREE = {"device", "golden", "kv_memory", "patience", "step_tokens", "threshold"}
BASE_FILES = {".gguf", ".jinja", ".json", ".model", ".safetensors"}
SAMPLE_BYTES = 2**20


def identity(prepared: Prepared, settings: TrainSettings) -> Mapping[str, str]:
    """Return what is the same in both runs: what it is called -> what it is."""
    given = {
        f"--{name.replace('_', '-')}": repr(value) for name, value in settings.model_dump().items() if name not in FREE
    }
    asked = {f"classifier {task.name!r}": _hash(repr(task.contract)) for task in prepared.tasks}
    return {"base": base_hash(prepared.base), "data": prepared.data_sha256} | asked | given


def base_hash(folder: Path) -> str:
    """Identify a base by its files: their names, their sizes, and samples from the beginning and the end of each. So
    two bases of one shape differ, and large ones are not read whole."""
    return _hash("\n".join(_samples(folder)))


def _samples(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.suffix in BASE_FILES and path.is_file():
            with path.open("rb") as file:
                size = path.stat().st_size
                found = sha256(file.read(SAMPLE_BYTES))
                file.seek(max(0, size - SAMPLE_BYTES))
                found.update(file.read())
            yield f"{path.name} {size} {found.hexdigest()}"


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
