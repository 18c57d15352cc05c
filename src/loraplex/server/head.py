"""The head of an HTTP/1.1 request: how long it may be, and the path that its first line names."""

import re

import h11

MAX_HEAD_BYTES = 16384  # of the first line and the headers together

_END = re.compile(rb"\n\r?\n")
_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(/?)([^#]*)", re.IGNORECASE)


class HeadConnection(h11.Connection):
    """The server's side of a connection, as h11 reads it, with two differences.

    A head above MAX_HEAD_BYTES is refused where it arrives in one piece, too: h11 limits only what is incomplete. An
    absolute target (`GET http://host/path`, which clients send to a proxy) becomes its path, and its host replaces the
    header Host, as RFC 9112 demands in 3.2.2.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            waiting, _ = self.trailing_data
            if len(waiting) > MAX_HEAD_BYTES and not _END.search(waiting, 0, MAX_HEAD_BYTES):
                self._process_error(self.their_role)  # as h11 does before it raises
                raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
        event = super().next_event()
        return _with_path(event) if isinstance(event, h11.Request) else event


def _with_path(request: h11.Request) -> h11.Request:
    absolute = _ABSOLUTE.fullmatch(request.target)
    if absolute is None:
        return request
    host, _, rest = absolute.groups()
    headers = [(b"host", host), *(one for one in request.headers if one[0] != b"host")]
    return h11.Request(method=request.method, headers=headers, target=b"/" + rest, http_version=request.http_version)
