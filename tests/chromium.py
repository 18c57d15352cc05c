"""Fixtures for tests/console: Debian's Chromium in front of a real server with keys.

Each test has a page of its own. At its end the page must have asked nobody but the server, and reported no error."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving

INFER_KEY, ADMIN_KEY = "infer-secret-0123456789", "admin-secret-0123456789"
DESK = serving.ROOT / "examples/support_desk"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Everything runs as root in CI, where Chromium's own sandbox does not start.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs .venv-console: make test-console")
    if CHROMIUM is None:
        pytest.fail("Debian's chromium is not installed: make chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """The demo's shared bundle, in a folder of its own, so that a test may load what lies beside it."""
    state = tmp_path_factory.mktemp("console") / "state"
    keys = f"ci:infer:{INFER_KEY} ops:admin:{ADMIN_KEY}"
    options = ("--state-dir", state, "--adapter-root", DESK, "--adhoc-questions", "--keep-inputs", "1h")
    with serving.serve(DESK / "bundle-shared", *options, LORAPLEX_API_KEYS=keys) as server:
        yield server


@pytest.fixture
def api(server: serving.Server) -> Iterator[httpx.Client]:
    """The server, asked by an operator."""
    with httpx.Client(base_url=server.url, timeout=60, headers={"X-API-Key": ADMIN_KEY}) as client:
        yield client


@pytest.fixture
def expected() -> list[str]:
    """Holds texts of errors that the page may report. A test adds to it."""
    return []


@pytest.fixture
def page(browser: Any, server: serving.Server, expected: list[str], tmp_path: Path) -> Iterator[Any]:
    """A page without a key. Where it ends, nothing has gone elsewhere and nothing was reported."""
    context = browser.new_context(base_url=server.url, viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    said, elsewhere = [], []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on(
        "request", lambda one: None if one.url.startswith((server.url, "data:", "blob:")) else elsewhere.append(one.url)
    )
    yield page
    context.close()
    assert elsewhere == []
    assert [one for one in said if not any(text in one for text in expected)] == []


@pytest.fixture
def admin(page: Any) -> Any:
    """The page, opened with an admin's key."""
    page.add_init_script(f"sessionStorage.setItem('loraplex.key', '{ADMIN_KEY}')")
    page.goto("/")
    page.wait_for_selector(".row")
    return page


@pytest.fixture
def judged(admin: Any) -> Any:
    """The first example, with all its turns judged."""
    admin.get_by_role("button", name="Try an example").click()
    admin.get_by_text("Judged after every turn").wait_for()
    return admin
