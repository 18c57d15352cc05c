"""Where an artifact is written: an archive or a folder, on this machine or (`sagemaker/artifact/s3.py`) in S3.

An output appears whole or not at all: `commit` makes it appear, and `rollback` removes what was written before."""

import errno
import hashlib
import os
import secrets
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, Protocol

from loraplex.disk import folder_beside
from loraplex.errors import BundleError
from loraplex.sagemaker.artifact.interrupts import held

RECORD = 20 * tarfile.BLOCKSIZE  # a tar file is a whole number of these


class Output(Protocol):
    """Takes the files of an artifact one after another, the manifest last."""

    def check(self, num_bytes: int) -> None:
        """Raise where the artifact cannot be written. Writes nothing. num_bytes: at most so many are written."""
        ...

    def begin(self, num_bytes: int) -> None: ...

    def add(self, name: str, size: int, chunks: Iterator[bytes]) -> None: ...

    def commit(self) -> None: ...

    def rollback(self) -> None:
        """Remove what was written. Also called where nothing was, or `begin` failed."""
        ...


class Stream(Protocol):
    """The one file that an archive is written to. The methods do what `Output`'s do."""

    def check(self, num_bytes: int) -> None: ...

    def begin(self, num_bytes: int) -> None: ...

    def write(self, data: bytes) -> None: ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...


def tar_bytes(sizes: Iterator[int]) -> int:
    """Return the bytes of an archive with files of these sizes, or a little more. Short names and sizes take one block
    of a header each; long ones take three more."""
    block = tarfile.BLOCKSIZE
    num_bytes = sum(4 * block + -(-size // block) * block for size in sizes) + RECORD
    return num_bytes + num_bytes // 1000 + 2**16  # gzip makes what it cannot compress this much longer at most


class Archive:
    """An Output that writes a `.tar.gz`, in one pass and with little memory. The bytes depend on the files' names and
    contents alone (and on zlib's version): not on times, owners or modes.

    sha256, size:  of what was written."""

    def __init__(self, stream: Stream, level: int) -> None:
        self._stream = stream
        self._zip = zlib.compressobj(level, zlib.DEFLATED, 16 + zlib.MAX_WBITS)  # 16: gzip's header, without a time
        self._digest = hashlib.sha256()
        self._position = 0  # in the archive, unzipped
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def check(self, num_bytes: int) -> None:
        self._stream.check(num_bytes)

    def begin(self, num_bytes: int) -> None:
        self._stream.begin(num_bytes)

    def add(self, name: str, size: int, chunks: Iterator[bytes]) -> None:
        header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the mode is 0644
        header.size = size
        self._write(header.tobuf(tarfile.PAX_FORMAT))
        for chunk in chunks:
            self._write(chunk)
        self._write(bytes(-self._position % tarfile.BLOCKSIZE))

    def commit(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._position % RECORD))
        self._emit(self._zip.flush())
        self._stream.commit()

    def rollback(self) -> None:
        self._stream.rollback()

    def _write(self, data: bytes) -> None:
        self._position += len(data)
        self._emit(self._zip.compress(data))

    def _emit(self, data: bytes) -> None:
        self._digest.update(data)
        self.size += len(data)
        self._stream.write(data)


class LocalFile:
    """A Stream to a file on this machine. It is written beside its name, and renamed when it is complete."""

    def __init__(self, path: Path, tell: Callable[[str], object] | None, *, replaces: bool = False) -> None:
        """tell: is called with a warning where the disk may be too small; None raises, because gzip saves nothing.
        replaces: whether a file of that name is replaced; otherwise it is an error."""
        self._path, self._tell, self._replaces = path, tell, replaces
        self._part = path.with_name(f".loraplex-{secrets.token_hex(4)}.part")  # short: `path` may be the longest name
        self._file: BinaryIO | None = None

    def check(self, num_bytes: int) -> None:
        _check_new(self._path, "give --force to replace it, or name another file", self._replaces)
        _check_room(self._path, num_bytes, self._tell)

    def begin(self, num_bytes: int) -> None:
        try:
            with held():
                self._file = self._part.open("xb")
        except OSError as exc:
            raise _unwritable(self._path, exc) from None

    def write(self, data: bytes) -> None:
        assert self._file is not None, "begin() comes first"
        try:
            self._file.write(data)
        except OSError as exc:
            raise _unwritable(self._path, exc) from None

    def commit(self) -> None:
        assert self._file is not None, "begin() comes first"
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.rename(self._path)
        except OSError as exc:
            raise _unwritable(self._path, exc) from None
        self._file = None

    def rollback(self) -> None:
        with held():
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()  # writes what is buffered, which a full disk may refuse again
                self._part.unlink(missing_ok=True)
                self._file = None


class LocalFolder:
    """An Output that writes a folder on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._work: TemporaryDirectory[str] | None = None

    def check(self, num_bytes: int) -> None:
        _check_new(self._path, "name a new folder: nothing is written over", False)
        _check_room(self._path, num_bytes, None)

    def begin(self, num_bytes: int) -> None:
        with held():
            self._work = folder_beside(self._path)
        self._made.mkdir()

    @property
    def _made(self) -> Path:
        assert self._work is not None, "begin() comes first"
        return Path(self._work.name, self._path.name)

    def add(self, name: str, size: int, chunks: Iterator[bytes]) -> None:
        target = self._made / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
        except OSError as exc:
            raise _unwritable(self._path, exc) from None

    def commit(self) -> None:
        try:
            self._made.rename(self._path)
        except OSError as exc:
            raise _unwritable(self._path, exc) from None
        self.rollback()

    def rollback(self) -> None:
        with held():
            if self._work is not None:
                self._work.cleanup()
                self._work = None


def _check_new(path: Path, remedy: str, replaces: bool) -> None:
    """Raise BundleError where something has the name `path`, or no file can be made there."""
    try:
        path.lstat()
    except OSError as exc:
        if exc.errno == errno.ENAMETOOLONG:
            raise _unwritable(path, exc) from None
    if os.path.lexists(path) and not (replaces and path.is_file()):
        is_file = path.is_file()
        raise BundleError(path, "exists already", remedy=remedy if is_file else "name another: nothing is written over")
    if not path.parent.is_dir():
        raise BundleError(
            path, f"there is no folder {str(path.parent)!r}", remedy="make the folder, or correct the name"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise BundleError(
            path, f"the folder {str(path.parent)!r} cannot be written to", remedy="name another, or change its rights"
        )


def _check_room(path: Path, num_bytes: int, tell: Callable[[str], object] | None) -> None:
    """Tell that the disk may be too small for `num_bytes`; without `tell`, raise BundleError."""
    free = shutil.disk_usage(path.parent).free
    if free >= num_bytes:
        return
    if tell is None:
        raise BundleError(
            path,
            f"needs {num_bytes:,} bytes, and {free:,} are free on its disk",
            remedy="make room, name a place on another disk, or pack straight to s3://…",
        )
    tell(f"{path}: up to {num_bytes:,} bytes are needed, and {free:,} are free on its disk")


def _unwritable(path: Path, exc: OSError) -> BundleError:
    return BundleError(
        path,
        f"cannot be written, and nothing of it was left: {exc.strerror or exc}",
        remedy="give a shorter name"
        if exc.errno == errno.ENAMETOOLONG
        else "make room on its disk, or name another place",
    )
