"""`make setup` tells what it does while it installs, and fails where pip fails. Scripts stand in for Python and pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import serving

PYTHON = """#!/bin/bash
mkdir -p "${@: -1}/bin" && cp pip "${@: -1}/bin/pip"
"""
PIP = """#!/bin/bash
case " $* " in *" --quiet "*) exit $STATUS;; esac
echo "Collecting torch==2.13.0 (from -r requirements.lock (line 1))"
echo "  Downloading torch-2.13.0-cp311-linux_x86_64.whl (190.1 MB)"
echo "  Using cached idna-3.10-py3-none-any.whl (70 kB)"
echo "Installing collected packages: torch, idna, numpy"
echo "ERROR: no space left" >&2
exit $STATUS
"""


@pytest.mark.parametrize("status", [0, 1])
def test_setup_tells_what_it_does(tmp_path: Path, status: int) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(serving.ROOT / name, tmp_path)
    for name, script in (("python", PYTHON), ("pip", PIP)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(
        ["make", "setup", "PYTHON=./python", "VENV=made"],
        cwd=tmp_path,
        env=environment | {"STATUS": str(status)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode == 0) == (status == 0) == (tmp_path / "made" / ".serving").exists(), run.stderr
    told = run.stdout.splitlines()
    assert told[0] == "1 of 3: making made" and "1.2 GB" in told[1]
    assert told[2:5] == [
        "  downloading torch-2.13.0-cp311-linux_x86_64.whl (190.1 MB)",
        "  from the cache: idna-3.10-py3-none-any.whl (70 kB)",
        "  writing the files …",
    ]
    assert "no space left" in run.stderr, "pip's own errors are shown"
    assert ("3 of 3: installing Loraplex itself" in told) == (status == 0)


def test_only_the_bundle_without_a_base_fetches_one(tmp_path: Path) -> None:
    shutil.copy(serving.ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    for options, is_fetched in (["BUNDLE=examples/smollm/bundle"], True), ([], False):
        run = subprocess.run(["make", "-n", "serve", *options], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert ("examples/smollm/fetch.py build/smollm" in run.stdout) == is_fetched
