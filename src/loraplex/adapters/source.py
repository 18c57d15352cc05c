"""What a user names (a folder, an archive, `hf://…`, `s3://…`) -> a verified local folder with a PEFT adapter's files.
Knows where the bytes come from and which of them are let in, not what they mean."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from loraplex.adapters.archive import unpack
from loraplex.adapters.files import (
    ARCHIVE,
    CHUNK,
    FILES,
    LIMITS,
    PICKLE,
    SourceLimits,
    check,
    check_size,
    reason_of,
    sizes_of,
)
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTRACT
from loraplex.errors import AdapterError

ATTEMPTS = 5  # at taking up a download that was cut, and at one whose object changes meanwhile
LONGEST = 4096  # characters that name a source
FORMS = {
    "hf": re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<folder>[\w./-]+?))?/?(@(?P<revision>[\w./-]+))?", re.ASCII),
    "s3": re.compile(r"(?P<bucket>[A-Za-z0-9._-]{3,63})(/(?P<key>[^?#]*?))?/?"),
}
SHAPES = "hf://org/name[/folder][@revision], s3://bucket/folder or s3://bucket/name.tar.gz"

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSource:
    """A folder that holds an adapter's config and safetensors, and perhaps its contract.

    `source` names it from any working directory and holds no credentials: to show, and to resolve again. Symlinks in
    it are kept, so that one which is moved to the next version leads there."""

    path: Path
    source: str
    remote: bool


def resolve_source(
    source: str | Path,
    *,
    roots: Sequence[Path],
    cache_dir: Path,
    limits: SourceLimits = LIMITS,
    progress: Progress | None = None,
) -> ResolvedSource:
    """The adapter that `source` names, as a verified local folder.

    A path must lie below one of `roots`, symlinks followed; a relative one is tried below each. What is unpacked or
    comes from S3 is kept in `cache_dir`, the hub's files in the hub's own cache. Nothing in `cache_dir` is removed:
    each version has a folder of its own, which may still be in use. `progress` gets the bytes so far and in all.
    Safe to call from several threads and processes at once. Raises AdapterError, whatever is wrong."""
    given = str(source)
    if not given or len(given) > LONGEST or not given.isprintable():  # NUL, line breaks, halves of surrogate pairs
        raise AdapterError(
            ascii(given[:80]),
            f"names no adapter: 1 to {LONGEST} printable characters are needed",
            remedy=f"give a path, {SHAPES}",
        )
    try:
        scheme, separator, rest = given.partition("://")
        if not separator or "/" in scheme:
            return _from_roots(given, roots, cache_dir, limits)
        place = FORMS[scheme].fullmatch(rest) if scheme in FORMS else None
        named = {key: value for key, value in place.groupdict().items() if value} if place else {}
        if not named or any(part in ("", ".", "..") for value in named.values() for part in value.split("/")):
            shown = f"{scheme}://…" if scheme.isalnum() else "…://…"  # the rest may hold a password
            raise AdapterError(
                shown, "is not an address that adapters are read from", remedy=f"give {SHAPES}; no user, no query"
            )
        if scheme == "hf":
            return _from_hub(named["repo"], named.get("folder"), named.get("revision"), limits, progress)
        return _from_s3(named["bucket"], named.get("key", ""), cache_dir, limits, progress)
    except OSError as exc:  # unreadable, or no room in the cache
        raise AdapterError(
            given, f"cannot be read or kept: {reason_of(exc)}", remedy="check permissions and disk space"
        ) from None


def _from_roots(given: str, roots: Sequence[Path], cache_dir: Path, limits: SourceLimits) -> ResolvedSource:
    tops = [os.path.realpath(root) for root in roots]

    def inside(path: str | Path) -> bool:
        return any(Path(os.path.realpath(path)).is_relative_to(top) for top in tops)

    # Where it is comes before whether it is, so that nobody learns what lies elsewhere.
    candidates = [path for root in roots if inside(path := Path(os.path.abspath(root)) / given)]
    if not candidates:
        raise AdapterError(
            given,
            "does not lie below an adapter root",
            remedy="move it there, or start with --adapter-root DIR, a folder that holds it",
        )
    named = next((path for path in candidates if os.path.exists(path)), None)
    if named is None:
        raise AdapterError(
            given, "no such folder below an adapter root", remedy=f"check the path and --adapter-root, or give {SHAPES}"
        )
    path = Path(os.path.realpath(named))
    if path.is_file() and given.endswith(ARCHIVE):
        archive, stat = path, path.stat()
        version = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        path = _cached(cache_dir, str(archive), version, lambda work: unpack(archive, work, given, limits))
    elif not path.is_dir():
        raise AdapterError(given, f"neither a folder nor a {ARCHIVE}", remedy="give the folder that PEFT saved")
    else:
        for name in FILES:
            if not inside(path / name):
                raise AdapterError(
                    given,
                    f"its {name} is a link that leads out of the adapter roots",
                    remedy="copy the file there, or start with --adapter-root DIR, a folder that holds it too",
                )
    check(given, sizes_of(path), limits)
    return ResolvedSource(path=path, source=str(named), remote=False)


def _from_hub(
    repo: str, folder: str | None, revision: str | None, limits: SourceLimits, progress: Progress | None
) -> ResolvedSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Draws nothing; the one that counts the bytes of all files reports them."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            with self.get_lock():  # each file has its thread
                self.n += n or 0
                if self.counts and progress is not None:
                    progress(int(self.n), total)

    source = f"hf://{repo}" + (f"/{folder}" if folder else "") + (f"@{revision}" if revision else "")
    total: int | None = None
    wanted = [f"{folder}/{name}" if folder else name for name in (*FILES, PICKLE)]
    try:
        with suppress(DryRunError):  # no hub: the next call takes what is cached, or says why it cannot be had
            listed = snapshot_download(repo, revision=revision, allow_patterns=wanted, dry_run=True, tqdm_class=Bar)
            check(source, {PurePosixPath(file.filename).name: file.file_size or 0 for file in listed}, limits)
            total = sum(file.file_size or 0 for file in listed if file.will_download and file.filename != wanted[-1])
            revision = listed[0].commit_hash  # so that what comes is what was checked
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=wanted[:-1], tqdm_class=Bar)
    except AdapterError:
        raise
    except Exception as exc:  # the library raises many kinds, httpx's among them; all mean that it cannot be had
        remedies = {
            GatedRepoError: "accept its terms on the hub, and set HF_TOKEN to a token of that account",
            RepositoryNotFoundError: "check the id; for a private repository set HF_TOKEN",
            RevisionNotFoundError: "check the branch, tag or commit behind '@'",
            LocalEntryNotFoundError: "check the network and HF_ENDPOINT; under HF_HUB_OFFLINE only the cache is read",
            HfHubHTTPError: "check the id and HF_ENDPOINT, set HF_TOKEN where one is needed; then try again",
            Exception: "check the id, the network and HF_ENDPOINT; then try again",
        }
        remedy = next(text for kind, text in remedies.items() if isinstance(exc, kind))
        raise AdapterError(source, f"the hub did not give it: {reason_of(exc)}", remedy=remedy) from None
    path = Path(snapshot, folder or "")
    check(source, sizes_of(path), limits)
    return ResolvedSource(path=path, source=source, remote=True)


@dataclass(frozen=True, slots=True)
class _Object:
    """An S3 object at one point of its life, which `etag` stands for."""

    bucket: str
    key: str
    etag: str
    size: int

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


def _from_s3(bucket: str, key: str, cache_dir: Path, limits: SourceLimits, progress: Progress | None) -> ResolvedSource:
    source = f"s3://{bucket}" + (f"/{key}" if key else "")
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import ClientError
    except ImportError:
        raise AdapterError(source, "S3 needs boto3, which is missing", remedy="pip install 'loraplex[aws]'") from None

    def build(work: Path) -> Path:
        _download(client, objects, work, progress)
        return unpack(work / objects[0].name, work, source, limits) if key.endswith(ARCHIVE) else work

    try:
        # A session of its own: boto3's default one may not be shared by threads.
        client = boto3.session.Session().client("s3", config=Config(connect_timeout=10))
        for _ in range(ATTEMPTS):
            objects = _list(client, bucket, key)
            sizes = {one.name: one.size for one in objects}
            if key.endswith(ARCHIVE):
                check_size(source, objects[0].name, objects[0].size, limits.max_bytes)
            else:
                check(source, sizes, limits)
                objects = [one for one in objects if one.name in FILES]
            version = " ".join(f"{one.key} {one.etag} {one.size}" for one in objects)
            try:
                path = _cached(cache_dir, source, version, build)
            except ClientError as exc:
                if exc.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                    raise
                continue  # it changed since it was listed
            check(source, sizes_of(path), limits)
            return ResolvedSource(path=path, source=source, remote=True)
    except (AdapterError, OSError):
        raise
    except Exception as exc:  # botocore has many kinds, and none of its own for an endpoint that is no URL or no S3
        status = exc.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(exc, ClientError) else None
        if status == 404:
            remedy = "check the bucket and the key"
        elif (status is not None and status < 500) or "Credentials" in type(exc).__name__:
            remedy = "check AWS_PROFILE or the AWS keys; they need s3:GetObject and s3:ListBucket"
        else:
            remedy = "check the network, AWS_REGION and AWS_ENDPOINT_URL; then try again, it goes on where it was cut"
        raise AdapterError(source, f"S3 did not give it: {reason_of(exc)}", remedy=remedy) from None
    raise AdapterError(source, "changes faster than it can be fetched", remedy="try again when it is written")


def _list(client: Any, bucket: str, key: str) -> list[_Object]:
    if key.endswith(ARCHIVE):
        head = client.head_object(Bucket=bucket, Key=key)
        return [_Object(bucket, key, head["ETag"], head["ContentLength"])]
    # Listed rather than asked for by name: a role that may not list gets the same answer for "missing" and "forbidden",
    # and a contract must not go missing in silence. By two prefixes, for there may be a million others.
    folder = f"{key}/" if key else ""
    pages = [
        page
        for start in ("adapter_", CONTRACT)
        for page in client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=f"{folder}{start}", Delimiter="/"
        )
    ]
    found = [
        _Object(bucket, one["Key"], one["ETag"], one["Size"]) for page in pages for one in page.get("Contents", ())
    ]
    return sorted((one for one in found if one.name in (*FILES, PICKLE)), key=lambda one: one.key)


def _download(client: Any, objects: Sequence[_Object], work: Path, progress: Progress | None) -> None:
    """Fetch `objects` into `work` by way of `.part` files beside it, which outlive a failure and say what they are
    part of, so that a later call asks for the rest only."""
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError

    folder = work.parent / "parts"
    folder.mkdir(exist_ok=True)
    parts = {folder / f"{_digest(f'{one.key} {one.etag}')}.part": one for one in objects}
    for stale in set(folder.iterdir()) - set(parts):
        stale.unlink()
    before, total = 0, sum(one.size for one in objects)
    for part, one in parts.items():
        part.touch()
        for attempt in range(ATTEMPTS):
            if (done := part.stat().st_size) == one.size:
                break
            place = {"Bucket": one.bucket, "Key": one.key, "IfMatch": one.etag}
            if 0 < done < one.size:
                place["Range"] = f"bytes={done}-"
            response = client.get_object(**place)
            resumed = response["ResponseMetadata"]["HTTPStatusCode"] == 206
            try:
                with closing(response["Body"]) as body, part.open("ab" if resumed else "wb") as file:
                    for chunk in body.iter_chunks(CHUNK):
                        file.write(chunk)
                        if progress is not None:
                            progress(before + file.tell(), total)
                        if file.tell() > one.size:
                            break
            except BotoCoreError as exc:  # cut, or damaged
                if isinstance(exc, FlexibleChecksumError):
                    part.write_bytes(b"")
                if attempt == ATTEMPTS - 1:
                    raise
        if part.stat().st_size != one.size:
            raise AdapterError(
                f"s3://{one.bucket}/{one.key}",
                f"came with {part.stat().st_size:,} bytes instead of {one.size:,}",
                remedy="try again; if it stays so, look at what stands between here and S3",
            )
        before += one.size
    for part, one in parts.items():
        part.rename(work / one.name)


def _cached(cache_dir: Path, source: str, version: str, build: Callable[[Path], Path]) -> Path:
    """The folder of this version of `source`: the one there is, or what `build` makes in the empty folder that it gets,
    moved into place when it is whole. One at a time builds, whether thread or process."""
    home = Path(os.path.abspath(cache_dir)) / _digest(source)
    path, work = home / _digest(version), home / "work"
    if not _whole(path):
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "lock"):
            if not _whole(path):
                for leftover in (path, work):
                    shutil.rmtree(leftover, ignore_errors=True)
                work.mkdir()
                try:
                    build(work).rename(path)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    return path


def _whole(path: Path) -> bool:
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(sizes_of(path))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
