"""API keys: how they are read and found, what is refused, and that no secret is repeated."""

from hashlib import sha256
from pathlib import Path

import pytest

from loraplex.config import ServerConfig
from loraplex.errors import ConfigurationError
from loraplex.server.keys import find_key, new_key, read_keys
from loraplex.server.process import listen
from loraplex.server.security import INFER, OPEN, PUBLIC

SECRET = "a-secret-that-is-long-enough"
HASH = sha256(SECRET.encode()).hexdigest()


def test_a_new_key_is_found_by_its_secret_only(tmp_path: Path) -> None:
    made = [new_key("ci", "infer"), new_key("ops", "admin")]
    (tmp_path / "keys").write_text("# ours\n\n" + "".join(f"{line}  # {line[:2]}\n" for _, line in made))
    keys = read_keys(str(tmp_path / "keys"), "")
    assert [(key.name, key.scope) for key in keys] == [("ci", "infer"), ("ops", "admin")]
    for (secret, line), key in zip(made, keys, strict=True):
        assert len(secret) >= 43 and secret not in line and secret not in repr(key)
        assert find_key(keys, secret.encode()) is key
    assert find_key(keys, b"") is None and find_key(keys, made[0][1].split()[2].encode()) is None


@pytest.mark.parametrize(
    ("name", "scope", "source"),
    [("a b", "infer", "--name a b: the name"), ("a", "root", "--scope root: there is no such scope")],
)
def test_a_new_key_names_the_option_that_is_wrong(name: str, scope: str, source: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        new_key(name, scope)
    assert raised.value.message.startswith(source)


def test_the_environment_gives_several_and_a_secret_may_hold_colons() -> None:
    keys = read_keys(None, f" ci:infer:{SECRET},ops:admin:with:colons:0123456 \n")
    assert [(key.name, key.scope) for key in keys] == [("ci", "infer"), ("ops", "admin")]
    assert find_key(keys, b"with:colons:0123456") is keys[1]
    assert read_keys(None, " ") == ()


@pytest.mark.parametrize(
    ("value", "source", "problem"),
    [
        (SECRET, "entry 1", "16 characters"),
        (f"infer:{SECRET}", "entry 1", "16 characters"),
        (f"ci:{SECRET}:infer", "entry 1", "16 characters"),
        (f"{SECRET}:infer:short", "entry 1", "16 characters"),
        (f"ci:infer:{SECRET} ops:admin", "entry 2", "16 characters"),
        ("ci:infer:fifteen-letter.", "entry 1", "16 characters"),
        (f"ci:root:{SECRET}", "entry 1", "no such scope"),
        (f"c/i:infer:{SECRET}", "entry 1", "name is not valid"),
        (f"ci:infer:{SECRET},ci:admin:{SECRET}2", "entry 2", "same name or secret"),
        (f"ci:infer:{SECRET},ops:admin:{SECRET}", "entry 2", "same name or secret"),
    ],
)
def test_a_wrong_entry_is_named_by_its_place(value: str, source: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as raised:
        read_keys(None, value)
    assert source in raised.value.message
    assert SECRET not in str(raised.value) and "fifteen" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "source", "problem"),
    [
        (f"ci infer {SECRET}\n", "line 1", "not `name scope sha256`"),
        (f"\nci infer {HASH.upper()}\n", "line 2", "not `name scope sha256`"),
        (f"ci infer {HASH} more\n", "line 1", "not `name scope sha256`"),
        (f"ci root {HASH}\n", "line 1", "no such scope"),
        (f"ci infer {HASH}\nci admin {HASH[::-1]}\n", "line 2", "same name or secret"),
        ("# nothing yet\n", "--api-key-file", "holds no key"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, text: str, source: str, problem: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=problem) as raised:
        read_keys(str(path), "")
    assert source in raised.value.message and str(path) in raised.value.message
    assert SECRET not in str(raised.value) and HASH not in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_keys(str(tmp_path / "none"), "")
    (tmp_path / "keys").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_keys(str(tmp_path / "keys"), "")


def test_a_key_of_the_file_and_of_the_environment_cannot_share_a_name(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"ci infer {HASH}\n")
    with pytest.raises(ConfigurationError, match="entry 1: an earlier key"):
        read_keys(str(tmp_path / "keys"), "ci:infer:another-secret-0123")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.77", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    listen(ServerConfig(host=host, port=0), ()).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "0"])
def test_other_hosts_need_a_key_or_insecure(host: str) -> None:
    with pytest.raises(ConfigurationError, match="no API keys") as raised:
        listen(ServerConfig(host=host, port=0), ())
    assert "--api-key-file" in raised.value.remedy and "--insecure" in raised.value.remedy
    listen(ServerConfig(host=host, port=0, insecure=True), ()).close()
    listen(ServerConfig(host=host, port=0), read_keys(None, f"ci:infer:{SECRET}")).close()


def test_what_needs_no_key_and_what_the_infer_scope_may_do() -> None:
    """To be changed together with the lists, and by nobody in passing."""
    assert OPEN == {"GET /health", "GET /ready", "GET /ping"}
    assert PUBLIC["metrics"] == {"GET /metrics"}
    assert PUBLIC["docs"] == {"GET /docs", "GET /docs/oauth2-redirect", "GET /redoc", "GET /openapi.json"}
    assert INFER - PUBLIC["metrics"] - PUBLIC["docs"] == {
        "POST /v1/classify",
        "POST /v1/decisions",
        "POST /v1/systemone",
        "POST /classify",
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "POST /v1/feedback",
        "POST /invocations",
        "GET /execution-parameters",
        "POST /tokenize",
        "POST /detokenize",
        "GET /v1/models",
        "GET /v1/classifiers",
    }
