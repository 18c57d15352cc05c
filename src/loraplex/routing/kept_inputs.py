"""The texts of classified requests, for a bounded time and within a bounded size. Knows no verdicts.

Texts lie in parts, one after the other, and a part is erased as a whole. On disk a part is a file, which is overwritten
and removed. So no text stays behind in a database's free pages or in its journal."""

import json
import logging
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, NamedTuple

from loraplex.amounts import duration_s
from loraplex.errors import InvalidRequestError, StateError, quoted
from loraplex.messages import message_json
from loraplex.routing.failures import Failures
from loraplex.types import ClassifyRequest

logger = logging.getLogger(__name__)

NUM_PARTS = 24  # of the time, and of the size
FLUSH_EVERY_S = 1.0
MOST_WAITING = 10_000  # texts between two flushes
PAGE_BYTES = 2**20
CLOCK_MS = 60_000  # a part may have begun so far in the future, because clocks are corrected
NAME = re.compile(r"(?P<began>\d{1,15})-(?P<ends>\d{1,15})\.jsonl")
PLACE = re.compile(r"(?P<began>\d{1,15})\.(?P<offset>\d{1,15})")


class KeptInput(NamedTuple):
    """id, conversation_id: the request's. input: text, or messages as a body holds them."""

    id: str
    input: str | tuple[dict[str, Any], ...]
    conversation_id: str | None = None


@dataclass(slots=True)
class _Part:
    """Texts that came one after the other.

    began_ms:  when the first text came, in milliseconds since 1970; no other part has the same.
    ends_ms:   when the part has to be erased at the latest.
    size:      bytes.
    content:   the texts, unless they are in a file.
    """

    began_ms: int
    ends_ms: int
    name: str
    size: int = 0
    content: bytearray = field(default_factory=bytearray)


class KeptInputs:
    """Any thread may call. After `start`, a thread of its own erases texts whose time is over, whatever the server
    does."""

    def __init__(
        self, folder: Path | None, *, keep: str, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        """Erase the texts in the folder whose time is over, and find the others.

        folder:     made if it is missing; None keeps the texts in memory.
        keep:       the time after which a text is gone, such as 7d. Texts that an earlier start kept go when either
                    their own or this time is over; with 0, all go now.
        max_bytes:  of all texts; beyond it the oldest part is erased.
        Raises StateError if the folder cannot be read or written."""
        seconds = duration_s(keep)
        assert seconds is not None, keep
        self.keep: Final = keep
        self._keep_ms, self._max_bytes, self._clock = seconds * 1000, max_bytes, clock
        self._path, self._folder = folder, -1
        self._added: deque[tuple[int, ClassifyRequest, str]] = deque(maxlen=MOST_WAITING)
        self._parts: list[_Part] = []  # oldest first
        self._last: _Part | None = None  # takes more texts; parts of an earlier start do not
        self._lock = threading.RLock()  # held while parts are used
        self._closed = threading.Event()
        self._failures = Failures(
            logger, "texts are not kept now, or NOT ERASED IN TIME", "texts are kept, and erased in time again"
        )
        self._was_full = False
        if folder is not None:
            with self._state_errors():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                # All files are named below this descriptor. So a folder that was replaced belongs to another server.
                self._folder = os.open(folder, os.O_RDONLY)
                weakref.finalize(self, os.close, self._folder)
                self._parts = sorted(self._found(), key=lambda part: part.began_ms)
            self.flush()

    def start(self) -> None:
        """Flush each second until `close`."""
        threading.Thread(target=self._flush_for_ever, name="loraplex-inputs", daemon=True).start()

    def close(self) -> None:
        """Flush for the last time. Texts whose time is not over stay in the folder for the next start."""
        self._closed.set()
        self.try_to_flush()

    def add(self, id: str, request: ClassifyRequest) -> None:
        """Keep the text of a request that was answered. Turns that the request leaves out are not kept."""
        self._added.append((self._now_ms(), request, id))

    def flush(self) -> None:
        """Erase the parts whose time is over, and write the texts that wait. Raises StateError if one of both cannot be
        done; texts that cannot be written are dropped."""
        now_ms = self._now_ms()
        try:
            with self._lock, self._state_errors():
                for part in [one for one in self._parts if self._is_over(one, now_ms)]:
                    self._erase(part)
                for _ in range(len(self._added)):
                    at_ms, request, id = self._added.popleft()
                    self._write(at_ms, _line(id, at_ms, request))
        except StateError:
            self._added.clear()
            self._last = None  # its last line may be cut short
            raise

    def try_to_flush(self) -> None:
        """Flush. A failure is only logged, because it must not cost an answer."""
        with self._failures.only_logged():
            self.flush()

    def read(self, since_s: float | None, after: str | None) -> tuple[list[KeptInput], str | None]:
        """Return a page of texts, oldest first, and what gives the next page; None: there is no other.

        since_s:  only texts of the last so many seconds. after: what the page before gave.
        Raises InvalidRequestError if `after` is no page's, and StateError if a file cannot be read."""
        found = PLACE.fullmatch("0.0" if after is None else after)
        if found is None:
            raise InvalidRequestError(f"after: {quoted(after)} is no page's", remedy="give the `after` of an answer")
        since_ms = 0 if since_s is None else self._now_ms() - round(since_s * 1000)
        with self._lock:
            self.flush()
            return self._read(int(found["began"]), int(found["offset"]), since_ms)

    # ------------------------------------------------------------------------------------------- parts

    def _flush_for_ever(self) -> None:
        while not self._closed.wait(FLUSH_EVERY_S):
            try:
                self.try_to_flush()
            except Exception:  # the next texts must be erased all the same
                logger.exception("texts are not erased in time")

    def _read(self, began_ms: int, offset: int, since_ms: int) -> tuple[list[KeptInput], str | None]:
        for part, following in zip_longest(self._parts, self._parts[1:]):
            if part.began_ms < began_ms or (following is not None and following.began_ms < since_ms):
                continue
            with self._state_errors():
                content = self._content(part)
            start = offset if part.began_ms == began_ms else 0
            kept, stop = _page(content, start, since_ms)
            if stop < len(content):
                return kept, f"{part.began_ms}.{stop}"
            return kept, None if following is None else f"{following.began_ms}.0"
        return [], None

    def _now_ms(self) -> int:
        return round(self._clock() * 1000)

    def _is_over(self, part: _Part, now_ms: int) -> bool:
        """Return whether a part is erased now: somewhat before its end, because the next flush may come late. A part
        from the future has an unknown age, because the clock was put back."""
        is_from_future = part.began_ms > now_ms + min(CLOCK_MS, self._keep_ms)
        return is_from_future or now_ms >= part.ends_ms - self._keep_ms // NUM_PARTS - FLUSH_EVERY_S * 1000

    def _write(self, at_ms: int, line: bytes) -> None:
        if len(line) > self._max_bytes:
            return
        while sum(part.size for part in self._parts) + len(line) > self._max_bytes:
            if not self._was_full:
                self._was_full = True
                logger.warning("texts are erased before their time, because they fill --keep-inputs-bytes")
            self._erase(self._parts[0])
        last = self._last
        if (
            last is None
            or at_ms >= last.began_ms + self._keep_ms // NUM_PARTS
            or last.size + len(line) > self._max_bytes // NUM_PARTS
        ):
            last = self._begin(at_ms)
        last.size += len(line)  # first, so that a line that is cut short counts
        if self._path is None:
            last.content += line
            return
        file = os.open(last.name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600, dir_fd=self._folder)
        with open(file, "wb") as writer:
            writer.write(line)

    def _begin(self, at_ms: int) -> _Part:
        began_ms = max([at_ms, *(part.began_ms + 1 for part in self._parts[-1:])])
        ends_ms = at_ms + self._keep_ms
        self._last = _Part(began_ms, ends_ms, f"{began_ms}-{ends_ms}.jsonl")
        self._parts.append(self._last)
        return self._last

    def _content(self, part: _Part) -> bytes:
        if self._path is None:
            return bytes(part.content)
        with suppress(FileNotFoundError):
            with open(os.open(part.name, os.O_RDONLY, dir_fd=self._folder), "rb") as file:
                return file.read()
        return b""

    def _erase(self, part: _Part) -> None:
        if self._path is not None:
            with suppress(FileNotFoundError):
                # Where the file system writes in place, the disk itself then holds the text no more.
                with suppress(OSError), open(os.open(part.name, os.O_WRONLY, dir_fd=self._folder), "wb") as file:
                    file.write(bytes(part.size))
                    file.flush()
                    os.fsync(file.fileno())
                os.unlink(part.name, dir_fd=self._folder)
        self._parts.remove(part)
        if part is self._last:
            self._last = None

    def _found(self) -> Iterator[_Part]:
        for name in os.listdir(self._folder):
            if found := NAME.fullmatch(name):
                began_ms, ends_ms = int(found["began"]), int(found["ends"])
                size = os.stat(name, dir_fd=self._folder).st_size
                yield _Part(began_ms, min(ends_ms, began_ms + self._keep_ms), name, size)

    @contextmanager
    def _state_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StateError(
                f"{self._path}: cannot be read or written: {exc.strerror or exc}",
                remedy="make the --state-dir a folder that can be written, free space on its disk, or delete the "
                f"folder {self._path} and start without --keep-inputs",
            ) from None


def _line(id: str, at_ms: int, request: ClassifyRequest) -> bytes:
    """Return the line of a text, as JSON. Halves of surrogate pairs, which UTF-8 cannot hold, become question marks."""
    kept: Any = request.input
    if not isinstance(kept, str):
        left_out = {role.lower() for role, name in (request.roles or {}).items() if name is None}
        kept = [message_json(one) for one in kept if one.role.lower() not in left_out]
    row = {"id": id, "at": at_ms, "input": kept}
    if request.conversation_id is not None:
        row["conversation_id"] = request.conversation_id
    written = json.dumps(row, ensure_ascii=False)
    return written.encode(errors="replace") + b"\n"


def _page(content: bytes, start: int, since_ms: int) -> tuple[list[KeptInput], int]:
    """Return the texts from `start` on that came since then, and where the page ends. A line that is cut short, as by a
    kill, is left out."""
    kept, stop = [], start
    while stop < len(content) and stop - start < PAGE_BYTES:
        end = content.find(b"\n", stop) + 1 or len(content)
        line, stop = content[stop:end], end
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if row["at"] >= since_ms:
                said = row["input"] if isinstance(row["input"], str) else tuple(row["input"])
                kept.append(KeptInput(row["id"], said, row.get("conversation_id")))
    return kept, stop
