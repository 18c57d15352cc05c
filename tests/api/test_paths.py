"""What a wrong path or a wrong method hears."""

import httpx
import pytest


@pytest.mark.parametrize(
    ("path", "similar"),
    [
        ("/v1/clasify", "/v1/classify"),
        ("/v1/classify/", "/v1/classify"),
        ("/V1/Classify", "/v1/classify"),
        ("/v2/classify", "/v1/classify"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/healthz", "/health"),
    ],
)
def test_an_unknown_path_names_similar_ones(http: httpx.Client, path: str, similar: str) -> None:
    response = http.post(path, json={})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["message"]) == (404, "not_found", f"there is no path {path!r}")
    assert error["remedy"].startswith("did you mean ") and similar in error["remedy"] and "/docs" in error["remedy"]


def test_a_path_like_no_other_points_to_the_documentation(http: httpx.Client) -> None:
    assert http.get("/" + "x" * 10_000).json()["error"]["remedy"] == "see /docs for the paths"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/classify", "POST"),
        ("POST", "/v1/adapters/task0", "DELETE, GET, PUT"),
        ("PATCH", "/v1/routes/any", "DELETE, GET, PUT"),
        ("POST", "/health", "GET, HEAD"),
        ("GET", "/v1/adapters/task0/pin", "DELETE, PUT"),
    ],
)
def test_a_wrong_method_names_the_right_ones(http: httpx.Client, method: str, path: str, allowed: str) -> None:
    response = http.request(method, path)
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)
    error = response.json()["error"]
    assert error["code"] == "method_not_allowed"
    assert error["message"] == f"{method} is not allowed for {path!r}; use {allowed}"
