"""A small hub, over HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMITS = {"main": "1" * 40, "v2": "2" * 40, "refs/pr/1": "3" * 40}


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that answers with `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as the client asks for: org/open, org/private (needs a token), org/gated. A subclass says what
    they hold."""

    asked: ClassVar[list[tuple[str, str]]]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append((self.command, path))
        repo = next((name for name in ("org/open", "org/private", "org/gated") if f"/{name}/" in path), None)
        if repo is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if repo == "org/private" and self.headers["Authorization"] != "Bearer hf_right":
            return self.answer(401)
        if repo == "org/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        kind, _, rest = path.partition(f"{repo}/")[2].partition("/")
        if kind == "revision":
            if rest not in COMMITS:
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            return self.answer_json({"id": repo, "sha": COMMITS[rest], "siblings": []})
        commit, _, name = rest.partition("/")
        files = self.files(commit)
        if kind == "tree":
            listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            return self.answer_json(listed)
        etag = hashlib.sha256(files[name]).hexdigest()
        return self.answer(200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name])

    do_HEAD = do_GET

    def files(self, commit: str) -> dict[str, bytes]:
        """What every repository holds at a commit."""
        raise NotImplementedError

    def answer_json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response_only(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
