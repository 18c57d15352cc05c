"""The commands that the README and the docs show run, each page's in order, on the demo."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

import serving
import tiny
from loraplex.cli.main import app

ROOT = serving.ROOT
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *ROOT.glob("examples/*/*.md"),
]
SERVES = re.compile(r"^(make serve|(\S+=\S+ )*loraplex serve )")
OURS = re.compile(r"loraplex [^|<>&;$`*]*")  # no shell is needed
# These set up an environment, take long, or need vLLM or other projects. Other tests run them, in a small form where
# they are long. No test runs what installs a service, or needs docker or a cluster: docs/deploy.md says what is tested.
ELSEWHERE = re.compile(
    r"^(make (dev|check|console|test|test-slow|chaos)|python examples/|loraplex bench |pip install |lm_eval|guidellm"
    r"|sudo |python -m benchmarks.other_tools |(BUNDLE=\S+ )?docker |kubectl )|--backend vllm"
)


def console(page: Path) -> list[str]:
    """The commands of the page's console blocks, without comments. One may go over several lines."""
    commands: list[str] = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.S):
        for line in textwrap.dedent(block.rstrip(" ")).splitlines():
            if line.startswith("$ "):
                commands.append(line[2:])
            else:
                commands[-1] += "\n" + line
    return [re.sub(r"\s+# .*$", "", command) for command in commands]


DRIVEN = {"improving.md"}  # tests/e2e/test_improving.py drives its round, and looks at what comes out
RUNNABLE = [
    page
    for page in PAGES
    if page.name not in DRIVEN and any(not ELSEWHERE.search(command) for command in console(page))
]


class Shell:
    """Runs commands in a folder that looks like the project's, and at most one server beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        for name in ("examples", "benchmarks", "docs"):
            (folder / name).symlink_to(ROOT / name)
        self._server = contextlib.ExitStack()

    def run(self, command: str) -> str:
        command = command.removesuffix(" &")
        if SERVES.match(command):
            return self._serve(command)
        if "VERDICT_ID" in command:
            answer = httpx.post(f"{self.url}/v1/classify", json={"input": "Customer: Bye!", "classifiers": "done"})
            command = command.replace("VERDICT_ID", answer.raise_for_status().json()["verdicts"][0]["id"])
        environment = {"LORAPLEX_URL": self.url} if self.url else {}
        command = command.replace("http://127.0.0.1:8000", self.url or "http://127.0.0.1:8000")
        if OURS.fullmatch(command):
            with contextlib.chdir(self.folder):
                run = serving.loraplex(*shlex.split(command.replace("\\\n", ""))[1:], stdin=None, **environment)
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            run = subprocess.run(
                ["bash", "-c", command],
                cwd=self.folder,
                env=os.environ | {"PATH": path} | environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
        assert run.returncode == 0, f"{command}: {run.stderr}"
        return run.stdout

    def _serve(self, command: str) -> str:
        self.close()
        arguments = shlex.split(command.replace("make serve", "loraplex serve examples/support_desk/bundle"))
        with contextlib.chdir(self.folder):
            server = self._server.enter_context(serving.serve(*arguments[2:]))
        self.url = server.url.replace("0.0.0.0", "127.0.0.1")
        return server.curl

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.close()


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_a_pages_commands_run_in_order(page: Path, shell: Shell) -> None:
    for command in console(page):
        if not ELSEWHERE.search(command):
            output = shell.run(command)
            if "loraplex classify" in command:
                assert "issueResolved" in output or "wantsInvoice" in output


def mentioned(page: Path) -> list[str]:
    """Every command that the page mentions, also within a sentence or an indented block."""
    text = page.read_text()
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S).replace("\n", " "))
    indented = re.findall(r"^ {4}(?:\$ )?(.+?)(?:\s+# .*)?$", text, re.M)
    return [one for one in (*console(page), *inline, *indented) if re.match(r"(python|make|loraplex) \S", one)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_what_a_page_mentions_exists(page: Path) -> None:
    """Targets of the Makefile, scripts and modules, sub-commands, and every option that is written out."""
    for command in mentioned(page):
        words = command.split()
        options = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        if words[0] == "make":
            targets = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)]
            assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets), command
        elif words[0] == "python":
            source = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
            assert (ROOT / source).is_file(), command
            known = (ROOT / source).read_text()
            assert all(f'"{option}"' in known for option in options), command
        else:
            known_options = set(options_of(words[1:], command))
            assert options <= known_options, f"{command}: {sorted(options - known_options)}"


def test_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:tests|src|benchmarks|examples)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def options_of(words: list[str], command: str) -> list[str]:
    found: Any = typer.main.get_command(app)
    for word in words:
        if not hasattr(found, "commands"):
            break
        assert word in found.commands, f"{command}: no command {word!r}"
        found = found.commands[word]
    return [option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)]
