"""Middlewares for what stands between a client and this server: trusted proxies, a path prefix, and browsers."""

import ipaddress
import re
from collections.abc import Collection, Iterable

from starlette._utils import get_route_path
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PORT = re.compile(r"\[([^\]]*)\](?::\d+)?|([\d.]+):\d+")
_FOR = re.compile(r'(?:^|[;,\s])for=("(?:[^"\\]|\\.)*"|[^;,\s]*)', re.IGNORECASE)


def path_of(scope: Scope) -> str:
    """Return a request's path without the prefix of a proxy, by the same function as the framework's router."""
    return get_route_path(scope)


def address_of(text: str) -> Address | None:
    """Return the address that a text names, with or without a port, or None. An IPv4 address that is written as an IPv6
    one, as a socket does that takes both, is an IPv4 address."""
    found = _PORT.fullmatch(text)
    try:
        address = ipaddress.ip_address((found[1] or found[2]) if found else text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class RootPath:
    """Middleware: sets the path prefix under which a proxy offers this server, whether or not the proxy removes it."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "root_path": self._root_path}
            if path_of(scope) == scope["path"]:  # the proxy has removed the prefix
                scope["path"] = self._root_path + scope["path"]
        await self.app(scope, receive, send)


class TrustedProxies:
    """Middleware: takes the client's address from `X-Forwarded-For`, or else from `Forwarded`, where trusted proxies
    wrote it. What others write there is ignored."""

    def __init__(self, app: ASGIApp, trusted: Collection[str]) -> None:
        self.app, self._networks = app, [ipaddress.ip_network(one) for one in trusted]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("client"):
            peer, port = scope["client"]
            client = self._client(address_of(peer), _hops(scope["headers"]))
            scope = {**scope, "client": (peer, port) if client is None else (str(client), port)}
        await self.app(scope, receive, send)

    def _client(self, address: Address | None, hops: list[str]) -> Address | None:
        """Return the address nearest to this server that is no trusted proxy's. hops: each proxy appends the address
        that asked it."""
        while address is not None and hops and any(address in network for network in self._networks):
            before = address_of(hops.pop())
            if before is None:  # such as `unknown`
                break
            address = before
        return address


def _hops(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    lists: dict[bytes, list[str]] = {b"x-forwarded-for": [], b"forwarded": []}
    for name, value in headers:
        if name in lists:
            lists[name].append(value.decode("latin-1"))
    if one := lists[b"x-forwarded-for"]:
        return [hop.strip() for hop in ",".join(one).split(",")]
    return [hop.strip('"') for hop in _FOR.findall(",".join(lists[b"forwarded"]))]


class Cors(CORSMiddleware):
    """Middleware: lets pages of other origins ask, and read the answers, errors included. A browser's question whether
    they may (a preflight) carries no key and needs none."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers=("*",),  # OpenAI's client sends a dozen of its own
            expose_headers=("X-Request-ID", "Retry-After", "Allow", "WWW-Authenticate"),
        )
