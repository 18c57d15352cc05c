"""Packs a bundle as the artifact that SageMaker's containers load: a `.tar.gz` or its files, here or in S3."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import loraplex
from loraplex.adapters.files import ARCHIVE, CHUNK, Progress
from loraplex.bundle import Bundle
from loraplex.disk import CHANGED, WRITE_ELSEWHERE, unchanged
from loraplex.errors import BundleError
from loraplex.sagemaker.artifact.interrupts import check, raising
from loraplex.sagemaker.artifact.layout import Member, lay_out
from loraplex.sagemaker.artifact.manifest import MANIFEST, AdapterEntry, FileEntry, Manifest
from loraplex.sagemaker.artifact.output import Archive, LocalFile, LocalFolder, Output, tar_bytes
from loraplex.sagemaker.artifact.s3 import S3Object, S3Prefix, place_of
from loraplex.sagemaker.artifact.trial import try_layout

# Weights hardly shrink: gzip's level 1 saves a fifth of them, packs at a twentieth of level 0's speed, and makes each
# start of an endpoint unpack at a quarter of it (docs/deploy-sagemaker.md).
LEVEL = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The artifact that `pack` made, or would make.

    files:   name -> bytes.
    size:    bytes of the archive, or of all files.
    sha256:  of the archive; of the manifest where there is no archive. None where nothing was written.
    """

    adapters: tuple[AdapterEntry, ...]
    files: dict[str, int]
    size: int
    sha256: str | None
    seconds: float


def pack(
    bundle: Bundle,
    out: str,
    *,
    uncompressed: bool = False,
    level: int = LEVEL,
    replaces: bool = False,
    proves: bool = False,
    is_dry: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> Packed:
    """Pack `bundle`, once all is checked that a start of its server checks.

    out:           `….tar.gz` or `s3://…/….tar.gz`; with `uncompressed`, a new folder or an empty `s3://…/`.
    level:         gzip's, 0 to 9.
    replaces:      write over an archive; a folder or a prefix must be new all the same.
    proves:        load the bundle, too, and ask each adapter's golden examples.
    is_dry:        check everything and write nothing.
    tell:          is called with a line about each thing to know.
    progress:      is called with the bytes read so far, and in all.
    Reads each file once, in pieces. Raises ConfigurationError where the bundle would not load, a file changes
    meanwhile, or the output cannot be written; then nothing of it is left."""
    began = time.monotonic()
    with raising():
        layout = lay_out(bundle)
        output = open_output(out, tell, uncompressed=uncompressed, level=level, replaces=replaces)
        if (
            isinstance(output, LocalFolder)
            and bundle.root is not None
            and Path(out).resolve().is_relative_to(bundle.root.resolve())
        ):
            raise BundleError(out, "lies in the bundle", remedy="name a folder outside the bundle")
    num_bytes = tar_bytes(one.size for one in layout.members) + 200 * len(layout.members)  # the manifest's lines
    try:
        with raising():
            with unchanged(layout.paths, BundleError):
                output.check(num_bytes)
                for note in layout.notes:
                    tell(note)
                adapters = tuple(try_layout(layout, bundle, tell, computes=proves))
                files = {one.name: one.size for one in layout.members}
                if is_dry:
                    seconds = time.monotonic() - began
                    return Packed(adapters=adapters, files=files, size=layout.num_bytes, sha256=None, seconds=seconds)
                check()
                output.begin(num_bytes)
                entries = {}
                done = 0
                for member in layout.members:
                    reader = _Reader(member, done, layout.num_bytes, progress)
                    output.add(member.name, member.size, reader.chunks())
                    entries[member.name] = reader.entry()
                    done += member.size
                manifest = Manifest(
                    loraplex_version=loraplex.__version__, base_name=layout.base_name, adapters=adapters, files=entries
                ).to_bytes()
                output.add(MANIFEST, len(manifest), iter([manifest]))
            output.commit()
    finally:
        output.rollback()  # does nothing after a commit
    size, sha256 = layout.num_bytes + len(manifest), hashlib.sha256(manifest).hexdigest()
    if isinstance(output, Archive):
        size, sha256 = output.size, output.sha256
    return Packed(
        adapters=adapters,
        files=files | {MANIFEST: len(manifest)},
        size=size,
        sha256=sha256,
        seconds=time.monotonic() - began,
    )


def open_output(
    out: str, tell: Callable[[str], object], *, uncompressed: bool, level: int = LEVEL, replaces: bool = False
) -> Output:
    """Return the Output that `out` names. Raises ConfigurationError where `out` has another form, or S3 needs boto3."""
    is_archive = out.endswith(ARCHIVE)
    if is_archive == uncompressed:
        raise BundleError(
            out,
            "names an archive, and --uncompressed writes a folder" if is_archive else f"is no name of a {ARCHIVE}",
            remedy="leave out --uncompressed, or name a folder" if is_archive else "give --uncompressed for a folder",
        )
    if "://" in out:
        place = place_of(out if is_archive else out.rstrip("/") + "/")
        return Archive(S3Object(place, replaces=replaces), level) if is_archive else S3Prefix(place)
    path = Path(out).expanduser().absolute()
    return (
        Archive(LocalFile(path, None if level == 0 else tell, replaces=replaces), level)
        if is_archive
        else LocalFolder(path)
    )


class _Reader:
    """Reads a member once, in chunks, and makes its entry."""

    def __init__(self, member: Member, before: int, total: int, progress: Progress) -> None:
        self._member, self._before, self._total, self._progress = member, before, total, progress
        self._digest = hashlib.sha256()

    def chunks(self) -> Iterator[bytes]:
        """Yield the member's content. Raises BundleError where it has not the size that it had."""
        done = 0
        for chunk in self._read():
            check()
            done += len(chunk)
            if done > self._member.size:
                break
            self._digest.update(chunk)
            self._progress(self._before + done, self._total)
            yield chunk
        if done != self._member.size:
            raise BundleError(self._member.content, CHANGED, remedy=WRITE_ELSEWHERE)

    def entry(self) -> FileEntry:
        return FileEntry(size=self._member.size, sha256=self._digest.hexdigest())

    def _read(self) -> Iterator[bytes]:
        content = self._member.content
        if isinstance(content, bytes):
            yield content
            return
        try:
            with content.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except OSError as exc:
            raise BundleError(content, f"is not readable: {exc.strerror or exc}", remedy="check the file") from None
