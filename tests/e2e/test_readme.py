"""What the README and the docs show, runs."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import serving
from loraplex.classifier import Contract
from loraplex.config import BundleSettings, validate
from loraplex.errors import ConfigurationError

PAGES = [serving.ROOT / "README.md", *sorted((serving.ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    found = [block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)]
    assert found, f"no {language} block in {[page.name for page in PAGES]}"
    return found


@pytest.fixture(scope="module")
def server(demo_bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(demo_bundle) as server:
        yield server


# tests/clients runs what needs TypeSafe's client.
@pytest.mark.parametrize("code", [one for one in blocks("python") if "typesafe_sdk" not in one])
def test_python_runs(code: str, server: serving.Server) -> None:
    environment = os.environ | {"LORAPLEX_URL": server.url}
    run = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8000", server.url)],
        cwd=serving.ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("yes ")


def test_the_contract_is_valid() -> None:
    found = [yaml.safe_load(block) for block in blocks("yaml")]
    [contract] = [one for one in found if "classifiers" not in one]
    assert Contract(**contract).labels == ("yes", "no")
    [settings] = [one for one in found if "classifiers" in one]
    assert validate(BundleSettings, settings, "docs", ConfigurationError).gates


def test_the_quick_starts_curl_body_is_what_the_server_takes(server: serving.Server) -> None:
    [command] = [block for block in blocks("console") if "curl" in block and "/v1/classify" in block]
    curl = shlex.split(command[command.index("curl") :])
    curl[2] = server.url + curl[2].partition(":8000")[2]
    run = subprocess.run(curl, capture_output=True, text=True, check=True, env=os.environ)
    assert '"issueResolved","label":"yes"' in run.stdout
    assert run.stdout.count('"label"') == 16


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
