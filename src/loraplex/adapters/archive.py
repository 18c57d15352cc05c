"""Unpacks the adapter in a `.tar.gz`. Trusts no name, size or header in the archive."""

import gzip
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from loraplex.adapters.files import ARCHIVE, CHUNK, FILES, PICKLE, SourceLimits, check, check_size, limit_of, reason_of
from loraplex.bundle import ADAPTER_CONFIG
from loraplex.disk import refuse_pointers
from loraplex.errors import AdapterError

HEADERS = 4 * 2**20  # bytes; each of a thousand members needs 1,000 to 2,000


class Unzipped:
    """The file that tarfile reads: an unzipped archive, read forward only. Raises AdapterError beyond `limit` bytes.

    tarfile trusts headers: it would read a name of gigabytes whole, and a negative size would make it loop for ever."""

    def __init__(self, file: BinaryIO, source: str, limit: int, headers: int = HEADERS) -> None:
        """headers: bytes of headers that tarfile may read."""
        self._file = gzip.GzipFile(fileobj=file)
        self._source, self._limit, self._position, self._headers = source, limit, 0, headers

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a header points backwards")
        while self._position < position and self.take(position - self._position):
            pass

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes of headers. Only tarfile calls this."""
        self._headers -= size
        if self._headers < 0:
            raise tarfile.ReadError("its headers are too long")
        return self.take(size)

    def take(self, size: int) -> bytes:
        """Return the next bytes, at most `size` and at most CHUNK. Empty at the end of the archive."""
        data = self._file.read(min(size, CHUNK))
        self._position += len(data)
        check_size(self._source, "the archive, unpacked,", self._position, self._limit)
        return data


def unpack(archive: Path, work: Path, source: str, limits: SourceLimits) -> Path:
    """Unpack the adapter in `archive` to a folder in `work`, and return that folder.

    The adapter is at the archive's root, or in the only folder that holds one. Raises AdapterError where the archive is
    damaged, exceeds `limits`, holds an unsafe member, or holds no adapter."""
    found: dict[str, dict[str, int]] = {}  # folder -> file -> bytes
    targets: dict[str, Path] = {}
    refuse_pointers([archive], AdapterError)
    remedy = f"pack the folder that PEFT saved again: tar czhf NAME{ARCHIVE} -C FOLDER ."
    try:
        with archive.open("rb") as file:
            unzipped: Any = Unzipped(file, source, limits.max_bytes)
            for number, member in enumerate(tarfile.TarFile(fileobj=unzipped), start=1):
                path = PurePosixPath(member.name)
                if number > limits.max_members:
                    raise AdapterError(source, f"holds more than {limits.max_members} members", remedy=remedy)
                if path.is_absolute() or ".." in path.parts:
                    raise AdapterError(source, f"member {member.name!r} points outside the archive", remedy=remedy)
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise AdapterError(source, f"member {member.name!r} is a link, a device or sparse", remedy=remedy)
                if member.isdir() or len(path.parts) > 2 or path.name not in (*FILES, PICKLE):
                    continue
                top = str(path.parent)
                files = found.setdefault(top, {})
                if path.name in files:
                    raise AdapterError(source, f"holds {member.name!r} twice", remedy=remedy)
                files[path.name] = member.size
                if path.name != PICKLE:
                    check_size(source, path.name, member.size, limit_of(path.name, limits))
                    target = targets.setdefault(top, work / f"unpacked-{len(targets)}")
                    target.mkdir(exist_ok=True)
                    _copy(unzipped, member, target / path.name)
            while unzipped.take(CHUNK):  # read to the end: the checksum comes last
                pass
    except AdapterError:
        raise
    except Exception as exc:  # TarError, OSError, EOFError, zlib.error, and others where headers are nonsense
        raise AdapterError(source, f"cannot be unpacked: {reason_of(exc)}", remedy=remedy) from None
    tops = [top for top, files in found.items() if ADAPTER_CONFIG in files] or list(found) or ["."]
    if len(tops) > 1 and "." not in tops:
        raise AdapterError(source, f"holds several adapters: {', '.join(map(repr, sorted(tops)))}", remedy=remedy)
    top = "." if "." in tops else tops[0]
    check(source, found.get(top, {}), limits)
    return targets[top]


def _copy(unzipped: Unzipped, member: tarfile.TarInfo, target: Path) -> None:
    unzipped.seek(member.offset_data)
    remaining = member.size
    with target.open("xb") as file:
        while remaining > 0:
            data = unzipped.take(remaining)
            if not data:
                raise EOFError("the archive ends within a file")
            remaining -= file.write(data)
