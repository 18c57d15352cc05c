"""`loraplex watch` against a real server."""

import httpx

import serving


def test_it_shows_the_classifiers_that_were_asked(http: httpx.Client, tiny_server: serving.Server) -> None:
    http.post("/v1/classify", json={"input": "Customer: hello", "classifiers": ["task0"]}).raise_for_status()
    run = serving.loraplex("watch", tiny_server.url, "--once", "--every", 0.2)
    assert run.returncode == 0, run.stderr
    assert "requests/s" in run.stdout and "task0" in run.stdout and "%" in run.stdout


def test_a_server_that_is_not_there_is_said(tiny_server: serving.Server) -> None:
    run = serving.loraplex("watch", "http://127.0.0.1:9", "--once")
    assert run.returncode == 1 and "unreachable" in run.stderr
    run = serving.loraplex("watch", f"{tiny_server.url}/v1", "--once")
    assert run.returncode == 1 and "not_found" in run.stderr
