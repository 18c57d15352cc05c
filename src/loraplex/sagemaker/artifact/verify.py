"""Verifies an artifact against its manifest: an archive or a folder, here or in S3. Unpacks nothing."""

import hashlib
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from loraplex.adapters.archive import Unzipped
from loraplex.adapters.files import ARCHIVE, CHUNK, Progress, reason_of
from loraplex.errors import BundleError
from loraplex.sagemaker.artifact.manifest import MANIFEST, MAX_BYTES, FileEntry, Manifest, read_manifest
from loraplex.sagemaker.artifact.s3 import calling, is_botocores, objects_below, open_object, place_of

READ, READ_FOLDER = 0o400, 0o500  # what the owner needs
SPECIAL = 0o6000  # setuid, setgid
HEADERS = 512 * 2**20  # bytes of an archive's headers; a manifest of the most bytes has fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The result of `verify`. Every name is in one of the three at most.

    missing:  the manifest names the file, and it is not there.
    changed:  the file has another size or content, comes twice, is a link or a folder, or unpacks with rights that
              `pack` never gives: unreadable for its owner, or setuid and the like.
    extra:    the manifest does not name the file, or no file in the folder.
    """

    manifest: Manifest
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        return not (self.missing or self.changed or self.extra)


def verify(where: str, progress: Progress = lambda done, total: None) -> Verified:
    """Compare the artifact at `where` with its manifest. `where`: a `.tar.gz` or a folder, on this machine or in S3.

    progress:  is called with the bytes read so far, and in all: of an archive as it is, not unpacked.
    Shows damage, and not who made the artifact: whoever changes a file can change the manifest, too. Raises
    ConfigurationError where the artifact cannot be read, or holds no manifest."""
    found = _Files(progress)
    _read(where, found)
    if found.manifest is None:
        raise BundleError(
            where, f"holds no {MANIFEST}", remedy="give all that `loraplex sagemaker pack` made: an archive or a folder"
        )
    manifest = read_manifest(where, found.manifest)
    folders = {str(parent) for name in {*manifest.files, *found.entries} for parent in PurePosixPath(name).parents}
    odd = found.odd | (found.folders - folders)
    names = found.entries.keys() | odd
    extra = names - manifest.files.keys() - folders - {MANIFEST}
    changed = odd | {name for name, one in found.entries.items() if manifest.files.get(name) != one}
    return Verified(
        manifest=manifest,
        missing=tuple(sorted(manifest.files.keys() - names)),
        changed=tuple(sorted(changed - extra)),
        extra=tuple(sorted(extra)),
    )


class _Headers(Unzipped):
    """last: what tarfile read last, which is the end where tarfile found one."""

    last = b""

    def read(self, size: int) -> bytes:
        self.last = super().read(size)
        return self.last


class _Files:
    """The files of an artifact, as far as they were read.

    manifest:  the manifest's text.
    odd:       names that come twice, belong to a link, a device or the like, or have odd rights.
    folders:   names of folders."""

    def __init__(self, progress: Progress) -> None:
        self.entries: dict[str, FileEntry] = {}
        self.manifest: bytes | None = None
        self.odd: set[str] = set()
        self.folders: set[str] = set()
        self._progress, self._done, self.total = progress, 0, 0

    def count(self, num_bytes: int) -> None:
        """Tell that so many bytes more of `total` were read."""
        self._done += num_bytes
        self._progress(self._done, self.total)

    def take(self, name: str, content: Iterable[bytes] | None) -> None:
        """Read a file. content: None for what is no plain file."""
        if content is None or name in self.entries or (name == MANIFEST and self.manifest is not None):
            self.odd.add(name)
            return
        digest, size, text = hashlib.sha256(), 0, bytearray()
        for chunk in content:
            digest.update(chunk)
            size += len(chunk)
            if name == MANIFEST and size <= MAX_BYTES:
                text += chunk
        if name == MANIFEST:
            self.manifest = bytes(text)
        else:
            self.entries[name] = FileEntry(size=size, sha256=digest.hexdigest())


def _read(where: str, files: _Files) -> None:
    is_archive = where.endswith(ARCHIVE)
    if "://" in where:
        place = place_of(where if is_archive else where.rstrip("/") + "/")
        with calling(place):
            if is_archive:
                files.total, opened = open_object(place)
                with closing(opened) as body:
                    return _read_archive(where, body, files)
            files.total, objects = objects_below(place)
            for name, content in objects:
                files.take(name, _counted(content, files))
            return
    path = Path(where).expanduser()
    try:
        if path.is_dir():
            return _read_folder(path, files)
        if is_archive:
            with path.open("rb") as file:
                files.total = path.stat().st_size
                return _read_archive(where, file, files)
    except OSError as exc:
        raise BundleError(where, f"is not readable: {exc.strerror or exc}", remedy="correct the path") from None
    raise BundleError(where, f"is neither a folder nor a {ARCHIVE}", remedy="correct the path")


def _read_folder(root: Path, files: _Files) -> None:
    files.total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    for folder, folders, names in os.walk(root, onerror=_raise):
        files.folders.add(Path(folder).relative_to(root).as_posix())
        for name in (*names, *(one for one in folders if os.path.islink(os.path.join(folder, one)))):
            path = Path(folder, name)
            is_file = path.is_file() and not path.is_symlink()
            files.take(path.relative_to(root).as_posix(), _counted(_chunks(path), files) if is_file else None)


def _counted(content: Iterable[bytes], files: _Files) -> Iterator[bytes]:
    for chunk in content:
        files.count(len(chunk))
        yield chunk


class _Counted:
    """The file that gzip reads."""

    def __init__(self, file: BinaryIO, files: _Files) -> None:
        self._file, self._files = file, files

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._files.count(len(data))
        return data


def _raise(exc: OSError) -> None:
    raise exc


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _read_archive(source: str, file: BinaryIO, files: _Files) -> None:
    """Read a `.tar.gz`. Trusts no name, size or header in it."""
    counted: Any = _Counted(file, files)
    try:
        unzipped: Any = _Headers(counted, source, sys.maxsize, HEADERS)
        for member in tarfile.TarFile(fileobj=unzipped):
            name = member.name.removeprefix("./")
            needed = READ_FOLDER if member.isdir() else READ
            if member.mode & (needed | (0 if member.isdir() else SPECIAL)) != needed:
                files.odd.add(name)
            if member.isdir():
                files.folders.add(name)
            else:
                is_file = member.isreg() and not member.issparse()
                files.take(name, _content(unzipped, member) if is_file else None)
        # tarfile takes any block that is no header for the end. The rest is read, because the checksum comes last.
        rest = unzipped.last
        while rest:
            if any(rest):
                raise tarfile.ReadError("it holds data after its end")
            rest = unzipped.take(CHUNK)
    except Exception as exc:  # TarError, OSError, EOFError, zlib.error, and others where headers are nonsense
        if is_botocores(exc):
            raise
        raise BundleError(
            source, f"is damaged, or not complete: {reason_of(exc)}", remedy="pack or copy the artifact again"
        ) from None


def _content(unzipped: Any, member: tarfile.TarInfo) -> Iterator[bytes]:
    unzipped.seek(member.offset_data)
    remaining = member.size
    while remaining > 0:
        data = unzipped.take(remaining)
        if not data:
            raise EOFError("it ends within a file")
        remaining -= len(data)
        yield data
