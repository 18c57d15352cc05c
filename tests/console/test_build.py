"""The files in the package are those that the source in console/ makes."""

import subprocess
from pathlib import Path

import pytest

import serving

pytest.importorskip("playwright.sync_api", reason="needs .venv-console: make test-console")
pytestmark = pytest.mark.console

SOURCE = serving.ROOT / "console"
BUILT = serving.ROOT / "src/loraplex/server/console_files"


def test_source_and_build_agree(tmp_path: Path) -> None:
    subprocess.run(["node", "build.mjs", str(tmp_path)], cwd=SOURCE, check=True, capture_output=True)
    made, kept = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, BUILT))
    assert made == kept, "run make console, and commit what it writes"
