"""The Dockerfiles: what `python tests/rehearsal.py` runs of them without Docker, and what must be the same in both."""

import json
import shlex
from pathlib import Path

import pytest

import loraplex
import rehearsal

DOCKER = rehearsal.ROOT / "docker"
BOTH = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cuda"]


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_every_instruction_is_rehearsed(path: Path) -> None:
    found = list(rehearsal.instructions(path.read_text()))
    assert {word for word, _ in found} <= set(rehearsal.INSTRUCTIONS)
    stages = [rest.partition(" AS ")[2] for word, rest in found if word == "FROM"]
    assert stages == ["dependencies", "code", "runtime", "sagemaker", ""]
    assert found[-1] == ("USER", "10001") and [one for one in found if one[0] == "USER"] == found[-1:]
    given = dict(found)
    assert json.loads(given["ENTRYPOINT"]) == ["python3", "-m", "loraplex.sagemaker.container"]
    labels = dict(one.split("=", 1) for one in shlex.split(given["LABEL"]))
    assert labels["org.opencontainers.image.version"] == loraplex.__version__
    assert labels["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"


def test_the_two_differ_in_their_arguments_only() -> None:
    cpu, cuda = (list(rehearsal.instructions(path.read_text())) for path in BOTH)
    assert cpu[2:] == cuda[2:]
    assert [rest.partition("=")[0] for _, rest in cuda[:2]] == ["BASE", "TORCH_INDEX"]


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.name)
def test_what_is_copied_is_not_ignored(path: Path, tmp_path: Path) -> None:
    rehearsal.copy_context(tmp_path / "context")
    for word, rest in rehearsal.instructions(path.read_text()):
        for one in shlex.split(rest)[:-1] if word == "COPY" and "--from" not in rest else ():
            assert (tmp_path / "context" / one).exists(), one
    assert not list((tmp_path / "context").rglob("__pycache__"))


def test_lines_that_go_on_and_comments_within_them() -> None:
    text = "# syntax=x\nFROM  a AS b\n\nRUN one \\\n    # why\n    && two\nENV A=1 \\\n    B=2\n"
    assert list(rehearsal.instructions(text)) == [("FROM", "a AS b"), ("RUN", "one && two"), ("ENV", "A=1 B=2")]
