"""One call, from its first attempt to its final answer: what is sent, when it is retried, and what it returns. Does no
I/O."""

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, Self, cast

import httpx
from pydantic import TypeAdapter, ValidationError

import loraplex
from loraplex.client.call import Answer, Call
from loraplex.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    ServerError,
    error_answered,
)
from loraplex.types import ErrorInfo

URL = "http://127.0.0.1:8000"
CONNECT_S = 10.0
PROBE_S = 5.0
POLL_S = 0.2  # between probes
GRACE_S = 5.0  # wait beyond the deadline for the server's own answer that the deadline has passed
BACKOFF_S = 0.5  # longest wait before the second attempt; doubles for each further one
MOST_BACKOFF_S = 8.0
MOST_RETRY_AFTER_S = 30.0

Outcome = httpx.Response | httpx.HTTPError  # what an attempt ended with

REFUSED = (429, 503)  # refused before any work was done
# Nothing was sent.
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
# The request may have arrived and been carried out; only the answer is missing.
NO_ANSWER = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)


@dataclass(frozen=True, slots=True)
class _ErrorBody:
    error: ErrorInfo


@cache
def _reader(answer: type[Any]) -> TypeAdapter[Any]:
    """Return a parser of `answer`. It ignores unknown fields, because a newer server may send more."""
    return TypeAdapter(answer)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """The server's URL, the key, and the limits on attempts. `timeout_s` is for one attempt."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float | None
    max_retries: int
    clock: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform

    @classmethod
    def to(cls, url: str | None, api_key: str | None, timeout_s: float | None, max_retries: int) -> Self:
        """Return a connection. A `url` or `api_key` that is None comes from the environment. Raises ConfigurationError
        if the URL or the key cannot be one."""
        url = (url or os.environ.get("LORAPLEX_URL") or URL).rstrip("/")
        key = (api_key or os.environ.get("LORAPLEX_API_KEY") or "").strip()  # a key from a file may end in a newline
        try:
            parsed = httpx.URL(url)
            is_url = parsed.scheme in ("http", "https") and bool(parsed.host)
        except httpx.InvalidURL:
            is_url = False
        if not is_url:
            raise ConfigurationError(url, "is not the URL of a server", remedy=f"give a URL such as {URL}")
        if not (key.isascii() and key.isprintable()):
            raise ConfigurationError(
                "the API key",
                "contains characters that no key has",
                remedy="give the key as `loraplex keys new` printed it",
            )
        return cls(url=url, api_key=key or None, timeout_s=timeout_s, max_retries=max_retries)

    def options(self) -> dict[str, Any]:
        """Return the arguments for an `httpx.Client`."""
        headers = {"User-Agent": f"loraplex/{loraplex.__version__}"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        # Callers limit their calls in flight; a limit here would only make threads wait for each other.
        return {"base_url": self.url, "headers": headers, "limits": httpx.Limits()}


class Exchange(Generic[Answer]):
    """Send `request()` and wait `delay_s(outcome)` seconds, and repeat both until the delay is None; then
    `result(outcome)` is the answer."""

    def __init__(self, connection: Connection, call: Call[Answer]) -> None:
        self._connection, self._call = connection, call
        self._num_sent = 0
        deadline_s = math.inf if call.deadline_ms is None else call.deadline_ms / 1000
        self._deadline = connection.clock() + deadline_s

    def request(self) -> dict[str, Any]:
        """Return the arguments for `httpx.Client.request`. Raises InvalidRequestError if the body cannot be written as
        JSON."""
        call, body = self._call, self._call.body
        left_s = self._left_s()
        if body is not None and call.deadline_ms is not None and self._num_sent:
            body = {**body, "deadline_ms": left_s * 1000}
        self._num_sent += 1
        request: dict[str, Any] = {"method": call.method, "url": call.path, "timeout": self._timeout(left_s)}
        if body is not None:
            try:
                request["content"] = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError) as exc:
                raise InvalidRequestError(
                    f"the request cannot be sent as JSON: {exc}",
                    remedy="give text in valid Unicode, and finite numbers",
                ) from exc
            request["headers"] = {"Content-Type": "application/json"}
        return request

    def delay_s(self, outcome: Outcome) -> float | None:
        """Return the seconds to wait before the next attempt, or None if `outcome` is final."""
        if self._call.is_probe or self._num_sent > self._connection.max_retries or not self._may_be_repeated(outcome):
            return None
        most_s = min(MOST_BACKOFF_S, BACKOFF_S * 2.0 ** min(self._num_sent - 1, 32))
        # The random part comes on top of Retry-After, so that refused clients do not all retry at once.
        delay_s = min(_retry_after_s(outcome) or 0.0, MOST_RETRY_AFTER_S) + self._connection.uniform(0, most_s)
        return delay_s if delay_s < self._left_s() else None

    def result(self, outcome: Outcome) -> Answer:
        """Return the answer. Raises the server's error as a LoraplexError, or ServerError if no valid answer came."""
        if isinstance(outcome, httpx.HTTPError):
            raise self._no_answer(outcome) from outcome
        if not outcome.is_success:
            raise self._error(outcome)
        try:
            return cast(Answer, _reader(cast(Any, self._call.answer)).validate_json(outcome.content))
        except ValidationError as exc:
            raise self._not_loraplex(outcome) from exc

    def _left_s(self) -> float:
        return self._deadline - self._connection.clock()

    def _timeout(self, left_s: float) -> httpx.Timeout:
        limit_s = min(
            math.inf if self._call.is_slow or self._connection.timeout_s is None else self._connection.timeout_s,
            PROBE_S if self._call.is_probe else math.inf,
            max(0.0, left_s) + GRACE_S,
        )
        return httpx.Timeout(None if limit_s == math.inf else limit_s, connect=min(limit_s, CONNECT_S))

    def _may_be_repeated(self, outcome: Outcome) -> bool:
        if isinstance(outcome, httpx.Response):
            # A stopping server also answers 503 to requests that it has begun.
            refused = outcome.status_code in (REFUSED[:1] if self._call.is_once else REFUSED)
            return refused or (self._call.is_safe and outcome.status_code == 502)
        return isinstance(outcome, NOT_SENT) or (self._call.is_safe and isinstance(outcome, NO_ANSWER))

    def _no_answer(self, exc: httpx.HTTPError) -> LoraplexError:
        is_late = isinstance(exc, httpx.TimeoutException) and not isinstance(exc, NOT_SENT)
        if is_late and self._left_s() <= 0:
            return DeadlineExceededError(
                f"{self._connection.url} did not answer by the deadline of {self._call.deadline_ms:g} ms",
                remedy="allow more time, or see the server's log",
            )
        return ServerError(
            "unreachable",
            f"{self._connection.url} does not answer: {str(exc) or type(exc).__name__}",
            remedy="raise the timeout, or see the server's log" if is_late else "check the URL, or start the server",
        )

    def _error(self, response: httpx.Response) -> LoraplexError:
        try:
            body: _ErrorBody = _reader(_ErrorBody).validate_json(response.content)
        except ValidationError:
            return self._not_loraplex(response)
        told = body.error
        error = error_answered(told.code, told.message, remedy=told.remedy, status=response.status_code)
        if isinstance(error, OverloadedError):
            error.retry_after_s = _retry_after_s(response) or error.retry_after_s
        return error

    def _not_loraplex(self, response: httpx.Response) -> ServerError:
        return ServerError(
            "not_loraplex",
            f"{self._connection.url} answers {response.status_code}, but not with Loraplex's JSON",
            remedy="check the URL, proxies on the way, and the server's version",
            status=response.status_code,
        )


def _retry_after_s(outcome: Outcome) -> float | None:
    """Return Retry-After in seconds, as Loraplex's server sends it, or None."""
    try:
        return max(0.0, float(outcome.headers["Retry-After"])) if isinstance(outcome, httpx.Response) else None
    except (KeyError, ValueError):
        return None
