"""Serves the console: a page for people, and its script and style, which are files of this package.

The files hold no secret, so that they need no key. All that the page shows, its script asks of the API."""

import hashlib
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

router = APIRouter(include_in_schema=False)

PAGE = "index.html"
# path -> (file, media type). `make console` builds the files from console/
FILES = {
    "/": (PAGE, "text/html; charset=utf-8"),
    "/console": (PAGE, "text/html; charset=utf-8"),
    "/console/console.js": ("console.js", "text/javascript; charset=utf-8"),
    "/console/console.css": ("console.css", "text/css; charset=utf-8"),
}
PATHS = frozenset(FILES)
OPERATIONS = frozenset(f"GET {path}" for path in FILES)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked for again each time: a new version of the server shows its own page
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@cache
def _content(name: str) -> tuple[bytes, str]:
    """Return a file's bytes, and the tag that changes with them."""
    content = (files("loraplex.server") / "console_files" / name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


async def _show(request: Request) -> Response:
    """Return the page or one of its files, or 304 where the browser has it already."""
    name, media_type = FILES[request.scope["route"].path]
    content, tag = _content(name)
    headers = {**HEADERS, "ETag": tag}
    if tag in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


for _path in FILES:
    router.add_api_route(_path, _show, methods=["GET", "HEAD"])
