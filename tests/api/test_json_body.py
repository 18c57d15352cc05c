"""What a body that is not sound JSON hears: where, what stands there, and what to change."""

import json
from typing import Any

import httpx
import pytest

from loraplex.server.json_body import MAX_DEPTH

JSON = {"Content-Type": "application/json"}
# Every route that takes JSON, as (method, path).
ROUTES = [
    ("POST", "/v1/classify"),
    ("POST", "/classify"),
    ("POST", "/v1/decisions"),
    ("POST", "/v1/systemone"),
    ("POST", "/invocations"),
    ("POST", "/endpoints/any/invocations"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("PUT", "/v1/adapters/any"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/adapters"),
    ("PUT", "/v1/routes/any"),
    ("POST", "/v1/feedback"),
    ("POST", "/v1/examples"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


def error(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    if "OriginalMessage" in body:  # AWS's shape
        body = json.loads(body["OriginalMessage"])
    body.pop("detail", None)  # TypeSafe's error, beside ours
    assert set(body) == {"error"}, response.text
    return {name: body["error"][name] for name in ("code", "message", "remedy")}


def test_the_routes_are_all_that_take_a_body(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    taking = {
        (method.upper(), path) for path, all_ in paths.items() for method in all_ if "requestBody" in all_[method]
    }
    assert {(method, path.replace("/any", "/{name}")) for method, path in ROUTES} - taking == {
        ("POST", "/endpoints/{name}/invocations")  # a middleware's
    }
    assert taking <= {(method, path.replace("/any", "/{name}")) for method, path in ROUTES}


@pytest.mark.parametrize(
    ("content", "message", "remedy"),
    [
        (b"", "the body is empty", "one JSON object"),
        (b" \n", "the body is empty", "one JSON object"),
        (b"{'input': 'x'}", "line 1, column 2: a key in double quotes is expected, found \"'input': 'x'}\"", "double"),
        (b"{\"input\": 'x'}", "line 1, column 11: a value is expected, found \"'x'}\"", "double quotes"),
        (b'{\n  "input": "x",\n}', "line 3, column 1: a key in double quotes is expected, found '}'", "the comma"),
        (b'{"inputs": ["x",]}', "line 1, column 17: a value is expected, found ']}'", "the comma"),
        (b'{input: "x"}', "line 1, column 2: a key in double quotes is expected, found 'input: \"x\"}'", "keys in do"),
        (b'{"input": "x", "deadline_ms": NaN}', "line 1, column 31: JSON has no NaN", "null or a finite"),
        (b'{"input": "NaN", "deadline_ms": -Infinity}', "line 1, column 33: JSON has no NaN", "null or a finite"),
        (b'{"input": NaNx}', "line 1, column 11: JSON has no NaN and no Infinity, found 'NaNx}'", "null or a finite"),
        (b'{"input": "\\"NaN", "raw": NaN}', "line 1, column 27: JSON has no NaN", "null or a finite"),
        (b'\xef\xbb\xbf{"a": "\xff"}', "the body is not text in UTF-8: byte 10 is 0xff", "UTF-8"),
        (b'{"input": "x", "raw": True}', "line 1, column 23: a value is expected, found 'True}'", "lower case"),
        (
            b"input=hello&classifiers=task0",
            "line 1, column 1: a value is expected, found 'input=hello&classifi…'",
            "form",
        ),
        (b'{"input": "x"', "a comma or a closing bracket is expected, the body ends", "ends too early"),
        (b'{"input": "x', "line 1, column 11: a text has no closing quote", "closing quote"),
        (b'{"input": "a\nb"}', "line 1, column 13: a control character in a text is not escaped", "line breaks"),
        (b'{"input" "x"}', "line 1, column 10: a colon is expected", "colon"),
        (b'{"input": "x"} {}', "line 1, column 16: nothing more is expected, found '{}'", "one JSON object"),
        (b'{"input": "x" /* no */}', "column 15: a comma or a closing bracket is expected", "comments"),
        ("\ufeff\ufeff{}".encode(), "line 1, column 1: a value is expected", "byte order mark"),
        (b'{"input": "caf\xe9"}', "the body is not text in UTF-8: byte 14 is 0xe9", "UTF-8"),
        (b'{"deadline_ms": ' + b"9" * 5000 + b"}", "a number of more than 4300 digits", "shorter"),
        (b"hello", "line 1, column 1: a value is expected, found 'hello'", "one JSON object"),
    ],
)
def test_where_it_is_no_json_what_stands_there_and_what_to_do(
    http: httpx.Client, content: bytes, message: str, remedy: str
) -> None:
    response = http.post("/v1/classify", content=content, headers=JSON)
    told = error(response)
    assert (response.status_code, told["code"]) == (400, "bad_input")
    assert message in told["message"] and remedy in told["remedy"], told


def test_a_byte_order_mark_is_read_over(http: httpx.Client) -> None:
    content = b'\xef\xbb\xbf{"input": "hello", "classifiers": "task0"}'
    assert http.post("/v1/classify", content=content, headers=JSON).status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_what_is_nested_too_deeply_is_said_on_every_route(http: httpx.Client, method: str, path: str) -> None:
    for depth in (MAX_DEPTH, 940, 970, 100_000):
        for opening, closing in (("[", "]"), ('{"input":', "}")):
            content = f'{{"suffix": {opening * depth}1{closing * depth}}}'
            response = http.request(method, path, content=content, headers=JSON)
            assert response.status_code in (400, 424)
            assert error(response)["message"] == "the body is nested too deeply"


def test_what_is_nested_less_is_read(http: httpx.Client) -> None:
    depth = MAX_DEPTH - 1  # inside the body's own object
    content = f'{{"input": "hello", "other": {"[" * depth}{"]" * depth}, "another": [{"[]," * 200}[]]}}'
    response = http.post("/v1/classify", content=content, headers=JSON)
    assert error(response)["message"] == "unknown field 'other'"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_key_that_comes_twice_is_refused_by_name_on_every_route(http: httpx.Client, method: str, path: str) -> None:
    for content in ('{"input": "a", "zz": 1, "zz": 1}', '{"input": [{"zz": "a", "zz": "b"}]}'):
        response = http.request(method, path, content=content, headers=JSON)
        assert response.status_code == (424 if "endpoints" in path else 422)
        assert error(response) == {
            "code": "invalid_request",
            "message": "the key 'zz' is given twice",
            "remedy": "give each key of an object once",
        }


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_wrong_content_type_is_named_on_every_route(http: httpx.Client, method: str, path: str) -> None:
    for given in ("application/x-www-form-urlencoded", "text/plain; charset=utf-8", "multipart/form-data"):
        response = http.request(method, path, content=b'{"input": "a"}', headers={"Content-Type": given})
        assert error(response)["message"] == f"Content-Type is {given!r}; send application/json"


def test_a_missing_content_type_is_json_unless_a_browser_left_it_out(http: httpx.Client) -> None:
    content = b'{"input": "hello", "classifiers": "task0"}'
    assert http.post("/v1/classify", content=content).status_code == 200
    assert http.post("/v1/classify", content=content, headers={"Content-Type": "application/x+json"}).status_code == 200
    browser = http.post("/v1/classify", content=content, headers={"Origin": "https://example.org"})
    assert browser.status_code == 422 and "Content-Type" in error(browser)["message"]


@pytest.mark.parametrize("content", [b"null", b"[]", b'"text"', b"3"])
def test_json_that_is_no_object_is_422(http: httpx.Client, content: bytes) -> None:
    response = http.post("/v1/classify", content=content, headers=JSON)
    assert (response.status_code, error(response)["message"]) == (422, "the body is not a JSON object")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_query_is_refused_by_name_on_every_route(http: httpx.Client, method: str, path: str) -> None:
    response = http.request(method, f"{path}?deadline_ms=5&x=1", json={})
    said = error(response)
    assert said["code"] == "invalid_request" and "'deadline_ms'" in said["message"] and "body" in said["remedy"]
    assert (424 if "/endpoints" in path else 422) == response.status_code


def test_a_boolean_for_a_number_is_refused(http: httpx.Client) -> None:
    said = error(http.post("/v1/classify", json={"input": "Customer: hello", "deadline_ms": True}))
    assert said["message"] == "deadline_ms: true is not a number"
