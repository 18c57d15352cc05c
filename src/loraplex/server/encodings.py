"""Compressed request bodies (`Content-Encoding`): which codings are read, and how they are kept within limits."""

import sys
import zlib
from collections.abc import Callable
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from loraplex.errors import BadInputError, UnsupportedEncodingError, quoted

MAX_WINDOW = 23  # log2 of the bytes that a zstd stream may keep in memory: 8 MiB, as RFC 9659 demands
MOST_STREAMS = 1000  # in one body; each costs time, even one without content

_OPEN: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "deflate": lambda: zlib.decompressobj(),
    "zstd": lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW}),
}
ACCEPTED = ", ".join((*_OPEN, "identity"))


class Decompressor:
    """Decompresses one body, piece by piece."""

    def __init__(self, coding: str) -> None:
        self._coding, self._open, self._num_streams = coding, _OPEN[coding], 0
        self._stream: Any = None

    def decompress(self, piece: bytes, most: int) -> bytes:
        """Return what the next piece of the body holds, `most` bytes of it at most. Raises BadInputError where the
        body is not compressed in this way."""
        made = b""
        while piece and len(made) < most:
            if self._stream is None:  # several streams, one after the other, are one body
                self._stream, self._num_streams = self._open(), self._num_streams + 1
                if self._num_streams > MOST_STREAMS:
                    raise self._broken(f"more than {MOST_STREAMS} streams")
            try:
                made += self._stream.decompress(piece, most - len(made))
            except (zlib.error, zstd.ZstdError) as exc:
                raise self._broken(str(exc).rpartition(": ")[2]) from None
            piece = b""
            if self._stream.eof:
                piece, self._stream = self._stream.unused_data, None
        return made

    def check_end(self) -> None:
        """Raise BadInputError where the body has ended too early."""
        if self._stream is not None:
            raise self._broken("it ends too early")

    def _broken(self, reason: str) -> BadInputError:
        return BadInputError(
            f"the body cannot be decompressed as {self._coding}: {reason}",
            remedy="send all of the compressed body, or send it uncompressed, without Content-Encoding",
        )


def decompressor_of(codings: str) -> Decompressor | None:
    """Return what decompresses a body with this Content-Encoding; None where nothing has to be done. Raises
    UnsupportedEncodingError for a coding that is not read, and for several."""
    named = [one.strip().lower().removeprefix("x-") for one in codings.split(",")]
    named = [one for one in named if one not in ("", "identity")]
    if not named:
        return None
    if len(named) > 1 or named[0] not in _OPEN:
        raise UnsupportedEncodingError(
            f"Content-Encoding is {quoted(codings)}, which this server does not read",
            remedy=f"send the body uncompressed, without Content-Encoding, or with one of: {', '.join(_OPEN)}",
        )
    return Decompressor(named[0])
