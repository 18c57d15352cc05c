"""Access control: which operation needs which key. If there are keys, only the operations listed here need none."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex.errors import ForbiddenError, KeyBusyError, UnauthorizedError
from loraplex.server import console, logs
from loraplex.server.keys import ApiKey, find_key
from loraplex.server.lifecycle import PROBES
from loraplex.server.paths import Paths
from loraplex.server.proxies import path_of

# An operation is a method and a path as the router sees it; HEAD counts as GET. Operations are compared whole: one that
# is spelled in any other way (a further slash, another case) needs the scope `admin`.
OPEN = frozenset(f"GET {path}" for path in PROBES)
PUBLIC = {
    "metrics": frozenset({"GET /metrics"}),
    "docs": frozenset({"GET /docs", "GET /docs/oauth2-redirect", "GET /redoc", "GET /openapi.json"}),
    "console": console.OPERATIONS,  # the page and its files, which ask for a key themselves
}
INFER = frozenset(
    {
        "POST /v1/classify",
        "POST /classify",
        "POST /v1/decisions",
        "POST /v1/systemone",
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "POST /tokenize",
        "POST /detokenize",
        "POST /v1/feedback",
        "GET /execution-parameters",
        "POST /invocations",  # also for /endpoints/{name}/invocations, which becomes this path
        "GET /v1/classifiers",
        "GET /v1/models",
        *PUBLIC["metrics"],
        *PUBLIC["docs"],
    }
)
MODEL = re.compile(r"GET /v1/models/(?!.*\.\.).*[^/]")  # also allowed for `infer`; everything else needs `admin`


class Access:
    """Middleware: refuses a request whose key is missing or insufficient, before its body is read."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[ApiKey],
        public: Collection[str],
        key_concurrency: int | None,
        paths: Paths,
    ) -> None:
        """paths: those that exist. Any key learns that an operation does not."""
        self.app, self._keys, self._key_concurrency, self._paths = app, keys, key_concurrency, paths
        self._open = OPEN.union(*(PUBLIC[what] for what in public))
        self._in_flight: Counter[str] = Counter()  # by key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        logs.current().is_trusted = False
        operation = f"{method} {path_of(scope)}"
        if operation in self._open:
            if (secret := _secret(scope)) and (known := find_key(self._keys, secret)):
                logs.current().key = known.name
            return await self.app(scope, receive, send)
        key = self._key_of(scope)
        logs.current().key, logs.current().is_trusted = key.name, key.scope == "admin"
        if key.scope != "admin" and operation not in INFER and not MODEL.fullmatch(operation):
            # Refused here in either case: the router takes some spellings that are not declared.
            if (refusal := self._paths.refusal(method, path_of(scope))) is not None:
                raise refusal
            raise ForbiddenError(
                f"the key {key.name!r} has the scope {key.scope!r}", remedy="use a key with the scope 'admin'"
            )
        if self._key_concurrency is not None and self._in_flight[key.name] >= self._key_concurrency:
            raise KeyBusyError(
                f"the key {key.name!r} has {self._key_concurrency} requests in flight",
                remedy="wait for an answer first, or raise --key-concurrency",
            )
        self._in_flight[key.name] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._in_flight[key.name] -= 1

    def _key_of(self, scope: Scope) -> ApiKey:
        remedy = "send `Authorization: Bearer KEY` or `X-API-Key: KEY`"
        secret = _secret(scope)
        if secret is None:
            raise UnauthorizedError("an API key is required", remedy=remedy)
        key = find_key(self._keys, secret)
        if key is None:
            raise UnauthorizedError("the API key is not one of this server's", remedy=remedy)
        return key


def _secret(scope: Scope) -> bytes | None:
    """Return the request's secret, or None. X-API-Key comes first, because Authorization may belong to a proxy."""
    bearer = None
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            return bytes(value)
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            bearer = value[7:].strip()
    return bearer
