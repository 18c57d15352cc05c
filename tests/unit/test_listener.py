"""How many connections may be open, from the limit on open files."""

import resource
import socket
from collections.abc import Iterator

import pytest

from loraplex.config import ServerConfig
from loraplex.errors import ConfigurationError
from loraplex.server.listener import SPARE, Listener, num_allowed
from loraplex.server.process import listen


@pytest.fixture(autouse=True)
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_becomes_the_hard_one(limits: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    num_allowed(None)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])


@pytest.mark.parametrize(
    ("num_files", "expected"), [(16, 8), (64, 32), (512, 256), (1024, 768), (20_000, 10_000), (-1, 10_000)]
)
def test_files_are_left_for_others(monkeypatch: pytest.MonkeyPatch, num_files: int, expected: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (num_files, num_files))
    assert num_allowed(None) == expected
    assert num_allowed(5) == 5


def test_more_than_there_can_be_is_refused_at_the_start() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ConfigurationError, match=rf"--max-connections {hard}: .* {hard} files.*ulimit -n"):
        listen(ServerConfig(port=0, max_connections=hard), ())


def test_closed_connections_make_room() -> None:
    with Listener(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.max_connections = 1
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        clients, accepted = [], []
        for _ in range(1 + SPARE):
            clients.append(socket.create_connection(listener.getsockname()))
            accepted.append(listener.accept()[0])
        for _ in range(2):
            with socket.create_connection(listener.getsockname()) as refused:
                listener.setblocking(False)
                with pytest.raises(BlockingIOError):
                    listener.accept()
                assert refused.recv(65536).startswith(b"HTTP/1.1 503 ")
        accepted[0].close()
        accepted[0].close()
        assert listener.num_open == SPARE
        with socket.create_connection(listener.getsockname()) as client:
            listener.accept()[0].close()
            assert client.recv(1) == b""
        for sock in (*clients, *accepted):
            sock.close()
        assert listener.num_open == 0
