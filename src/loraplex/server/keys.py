"""API keys, read from a file or the environment. Each has a name, a scope and the hash of a secret."""

import hmac
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from loraplex.errors import ConfigurationError

KeyScope = Literal["infer", "admin"]

ENVIRONMENT = "LORAPLEX_API_KEYS"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
DIGEST = re.compile(r"[0-9a-f]{64}")
MIN_SECRET = 16  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """An API key.

    digest:  SHA-256 of the secret. The secret is long and random, so no slow hash is needed.
    """

    name: str
    scope: KeyScope
    digest: bytes = field(repr=False)


def new_key(name: str, scope: str) -> tuple[str, str]:
    """Return a new secret, and its line for the key file. Raises ConfigurationError if `name` or `scope` is not
    valid."""
    _check(f"--name {name}", f"--scope {scope}", name, scope)
    secret = secrets.token_urlsafe(32)
    return secret, f"{name} {scope} {sha256(secret.encode()).hexdigest()}"


def find_key(keys: Sequence[ApiKey], secret: bytes) -> ApiKey | None:
    """Return the key that has this secret, or None. The time taken does not depend on which key matches."""
    digest, found = sha256(secret).digest(), None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def read_keys(path: str | None, environment: str) -> tuple[ApiKey, ...]:
    """Return the keys of the file at `path` and of the environment variable LORAPLEX_API_KEYS. Raises
    ConfigurationError. The message names the line or entry but never shows its text, which may be a secret."""
    keys: list[ApiKey] = []
    for source, key in (*_of_file(path), *_of_environment(environment)):
        if any(key.name == other.name or key.digest == other.digest for other in keys):
            raise ConfigurationError(source, "an earlier key has the same name or secret", remedy="remove one of them")
        keys.append(key)
    return tuple(keys)


def _of_file(path: str | None) -> Iterator[tuple[str, ApiKey]]:
    """Yield (source, key) for each line `name scope sha256`. Text after a # is a comment."""
    if path is None:
        return
    remedy = "give the lines that `loraplex keys new --name NAME --scope infer` prints"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"--api-key-file {path}", f"cannot be read: {reason}", remedy=remedy) from None
    is_empty = True
    for number, line in enumerate(lines, 1):
        parts = line.partition("#")[0].split()
        if not parts:
            continue
        source = f"{path}, line {number}"
        if len(parts) != 3 or not DIGEST.fullmatch(parts[2]):
            raise ConfigurationError(source, "is not `name scope sha256`, in lower-case hex", remedy=remedy)
        scope = _check(source, source, parts[0], parts[1])
        yield source, ApiKey(name=parts[0], scope=scope, digest=bytes.fromhex(parts[2]))
        is_empty = False
    if is_empty:
        raise ConfigurationError(f"--api-key-file {path}", "holds no key", remedy=remedy)


def _of_environment(value: str) -> Iterator[tuple[str, ApiKey]]:
    """Yield (source, key) for each `name:scope:secret`. Spaces or commas separate the entries."""
    for number, entry in enumerate(value.replace(",", " ").split(), 1):
        source = f"{ENVIRONMENT}, entry {number}"
        parts = entry.split(":", 2)
        if len(parts) != 3 or len(parts[2]) < MIN_SECRET:
            raise ConfigurationError(
                source,
                f"is not `name:scope:secret` with a secret of {MIN_SECRET} characters or more",
                remedy="take one from `loraplex keys new`, or from `openssl rand -hex 32`",
            )
        name, scope, secret = parts[0], _check(source, source, *parts[:2]), parts[2]
        yield source, ApiKey(name=name, scope=scope, digest=sha256(secret.encode(errors="surrogateescape")).digest())


def _check(at_name: str, at_scope: str, name: str, scope: str) -> KeyScope:
    """Return the scope. Raises ConfigurationError with the place of what is not valid."""
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            at_name, "the name is not valid", remedy="use letters, digits, '.', '_' and '-', 64 at most"
        )
    for known in get_args(KeyScope):
        if scope == known:
            return known  # type: ignore[no-any-return]
    raise ConfigurationError(at_scope, "there is no such scope", remedy="use infer or admin")
