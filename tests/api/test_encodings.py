"""Compressed request bodies: read like others, bounded after decompression, refused where they are broken."""

import gzip
import json
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import serving
from loraplex.errors import BadInputError
from loraplex.server.encodings import ACCEPTED, MOST_STREAMS, decompressor_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BODY = json.dumps({"input": "Customer: hello", "classifiers": "task0"}).encode()
MOST = 100_000
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
}
CODINGS = sorted(COMPRESS)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(tiny_bundle, "--dtype", "float32", "--max-body-bytes", MOST, "--log-inputs") as server:
        yield server


@pytest.fixture
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as client:
        yield client


def post(
    http: httpx.Client, content: bytes | Iterator[bytes], coding: str, path: str = "/v1/classify"
) -> httpx.Response:
    return http.post(path, content=content, headers={"Content-Type": "application/json", "Content-Encoding": coding})


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("coding", CODINGS)
def test_a_compressed_body_is_answered_as_it_is_without(http: httpx.Client, coding: str) -> None:
    [expected] = post(http, BODY, "identity").json()["verdicts"]
    content = COMPRESS[coding](BODY)
    for sent in (content, iter([content[:7], content[7:8], content[8:]])):
        answer = post(http, sent, coding.upper())
        assert answer.status_code == 200, answer.text
        [verdict] = answer.json()["verdicts"]
        assert (verdict["label"], verdict["scores"]) == (expected["label"], expected["scores"])


def test_on_every_path_that_takes_a_body(http: httpx.Client) -> None:
    bodies = {
        "/invocations": {"input_text": "hello", "adapter_name": "task0"},
        "/endpoints/any/invocations": {"input_text": "hello", "adapter_name": "task0"},
        "/v1/completions": {"model": "verbatim", "prompt": "hello", "max_tokens": 1},
    }
    for path, body in bodies.items():
        answer = post(http, gzip.compress(json.dumps(body).encode()), "x-gzip", path)
        assert answer.status_code == 200, answer.text


def test_several_streams_are_one_body(http: httpx.Client) -> None:
    for coding in ("gzip", "zstd"):
        content = COMPRESS[coding](BODY[:9]) + COMPRESS[coding](b"") + COMPRESS[coding](BODY[9:])
        assert post(http, content, coding).status_code == 200


@pytest.mark.parametrize("coding", CODINGS)
def test_the_bound_holds_after_decompression(http: httpx.Client, coding: str) -> None:
    for size, status in ((MOST, 200), (MOST + 1, 413)):
        answer = post(http, COMPRESS[coding](BODY.ljust(size)), coding)
        assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == "body_too_large" and "decompressed" in error["message"]
    assert "--max-body-bytes" in error["remedy"]


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_costs_no_memory(server: serving.Server, http: httpx.Client, coding: str) -> None:
    bomb = COMPRESS[coding](bytes(50_000_000))
    assert len(bomb) < MOST
    process = psutil.Process(server.process.pid)
    post(http, bomb, coding)
    before = process.memory_info().rss
    for _ in range(5):
        assert code_of(post(http, bomb, coding)) == (413, "body_too_large")
    assert process.memory_info().rss - before < 10_000_000


@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_compressed_is_bounded_too(http: httpx.Client, coding: str) -> None:
    noise = random.Random(0).randbytes(MOST + 1)
    assert code_of(post(http, noise, coding))[0] == 413
    assert code_of(post(http, COMPRESS[coding](noise[:-300]), coding))[1] in ("bad_input", "body_too_large")


@pytest.mark.parametrize("coding", CODINGS)
def test_a_broken_stream_is_named(http: httpx.Client, coding: str) -> None:
    content = COMPRESS[coding](BODY)
    middle = len(content) // 2
    broken = [
        content[:-3],
        content[:1],
        content[:middle],
        content + b"more",
        BODY,
        b"\0" + content,
        content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
    ]
    for sent in broken:
        answer = post(http, sent, coding)
        assert code_of(answer) == (400, "bad_input"), sent
        error = answer.json()["error"]
        if "decompressed" in error["message"]:  # else the stream was whole, and its text is no JSON
            assert coding in error["message"] and "Content-Encoding" in error["remedy"]
    assert post(http, content, coding).status_code == 200


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, gzip", "gzip, br", "identity, br", "x-zip", "x" * 5000])
def test_other_codings_are_refused_with_those_that_are_read(http: httpx.Client, coding: str) -> None:
    answer = post(http, gzip.compress(BODY), coding)
    assert code_of(answer) == (415, "unsupported_encoding")
    assert answer.headers["Accept-Encoding"] == ACCEPTED == "gzip, deflate, zstd, identity"
    assert "gzip, deflate, zstd" in answer.json()["error"]["remedy"] and len(answer.text) < 1000


def test_no_body_is_no_broken_one(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"Content-Encoding": "gzip"}).status_code == 200
    assert code_of(post(http, b"", "gzip")) == (400, "bad_input")


def test_identity_among_others_changes_nothing(http: httpx.Client) -> None:
    assert post(http, gzip.compress(BODY), "identity , GZip,").status_code == 200
    assert decompressor_of(" , identity") is None


@pytest.mark.parametrize("coding", CODINGS)
def test_no_piece_makes_more_than_the_limit(coding: str) -> None:
    content = COMPRESS[coding](bytes(20_000_000))
    tracemalloc.start()
    made = b"".join(
        decompressor.decompress(content, most)
        for most in (1, 1000, 10_000)
        if (decompressor := decompressor_of(coding)) is not None
    )
    assert made == bytes(11_001) and tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_many_empty_streams_are_refused_soon() -> None:
    for coding in ("gzip", "zstd"):
        decompressor = decompressor_of(coding)
        assert decompressor is not None
        empty = COMPRESS[coding](b"")
        assert decompressor.decompress(empty * MOST_STREAMS, 10) == b""
        decompressor.check_end()
        with pytest.raises(BadInputError, match=f"more than {MOST_STREAMS} streams"):
            decompressor.decompress(empty, 10)


def test_a_zstd_window_has_a_limit() -> None:
    """A few bytes could otherwise make the server reserve gigabytes."""
    wanted = zstd.CompressionParameter
    options: dict[int, int] = {wanted.window_log: 27, wanted.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    content = compressor.compress(BODY) + compressor.flush()
    decompressor = decompressor_of("zstd")
    assert decompressor is not None
    with pytest.raises(BadInputError, match="memory"):
        decompressor.decompress(content, MOST)
