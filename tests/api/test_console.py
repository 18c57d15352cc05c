"""The console's page and files: who gets them, with which headers, and what is left without them."""

import asyncio
import re
from pathlib import Path
from typing import cast

import httpx
import pytest
from fastapi import FastAPI

import serving
from loraplex.config import ServerConfig
from loraplex.routing.router import Router
from loraplex.server import console
from loraplex.server.app import create_app
from loraplex.server.keys import read_keys
from loraplex.server.lifecycle import Lifecycle

FILES = serving.ROOT / "src/loraplex/server/console_files"


def app(*, lifecycle: Lifecycle | None = None, **config: object) -> FastAPI:
    keys = read_keys(None, "ci:infer:infer-secret-0123456789")
    return create_app(ServerConfig.model_validate(config), keys, lifecycle or Lifecycle(cast(Router, object())))


def ask(app: FastAPI, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://any") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize("path", console.FILES)
def test_the_page_and_its_files_need_no_key_and_let_nothing_else_in(path: str) -> None:
    response = ask(app(), path)
    assert response.status_code == 200
    assert response.content == (FILES / console.FILES[path][0]).read_bytes()
    policy = response.headers["Content-Security-Policy"].split("; ")
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert not any("unsafe" in one or "http" in one for one in policy)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    head = ask(app(), path, "HEAD")
    assert (head.status_code, head.headers["ETag"]) == (200, response.headers["ETag"])


def test_a_browser_that_has_a_file_does_not_get_it_again() -> None:
    tag = ask(app(), "/").headers["ETag"]
    again = ask(app(), "/", **{"If-None-Match": f'W/"x", {tag}'})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    assert again.headers["Cache-Control"] == "no-cache"


def test_the_page_is_there_while_the_model_loads() -> None:
    loading = app(lifecycle=Lifecycle())
    assert ask(loading, "/").status_code == 200
    assert ask(loading, "/v1/models", **{"X-API-Key": "infer-secret-0123456789"}).status_code == 503


def test_no_console_leaves_the_paths_unknown() -> None:
    without = app(no_console=True)
    for path in console.FILES:
        assert ask(without, path).status_code == 401
        assert ask(without, path, **{"X-API-Key": "infer-secret-0123456789"}).status_code == 404


def test_below_a_proxys_prefix_the_page_finds_its_files() -> None:
    behind = app(root_path="/llm")
    page = ask(behind, "/llm/").text
    assert 'src="console/console.js"' in page and 'href="console/console.css"' in page
    for path in ("/llm/console", "/llm/console/console.js", "/console/console.css"):
        assert ask(behind, path).status_code == 200


def test_the_files_are_small_and_in_the_wheel() -> None:
    assert sum(path.stat().st_size for path in FILES.iterdir()) <= 400_000
    assert {path.name for path in FILES.iterdir()} == {name for name, _ in console.FILES.values()}
    assert '"server/console_files/*"' in Path(serving.ROOT / "pyproject.toml").read_text()


def test_the_page_asks_nobody_else() -> None:
    """Nothing is fetched from elsewhere, nor written into the page by hand."""
    page = (FILES / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    assert "<style" not in page and not re.search(r" (style|on\w+)=", page)


def test_classifiers_tell_what_they_ask_and_when(http: httpx.Client) -> None:
    listed = http.get("/v1/classifiers").json()
    cards = {one["name"]: one for one in listed["classifiers"]}
    assert listed["answers_questions"] is False
    assert cards["task0"]["labels"] and cards["task0"]["question"] and cards["task0"]["roles"]
    assert cards["verbatim"] == {**cards["verbatim"], "question": None, "labels": None, "is_route": False}


def test_a_route_has_what_its_heaviest_target_asks(http: httpx.Client) -> None:
    http.put("/v1/routes/fromConsole", json={"targets": {"verbatim": 0.1, "task0": 0.9}})
    try:
        cards = {one["name"]: one for one in http.get("/v1/classifiers").json()["classifiers"]}
        route = cards["fromConsole"]
        assert route["is_route"] and route["labels"] == cards["task0"]["labels"]
    finally:
        http.delete("/v1/routes/fromConsole")
