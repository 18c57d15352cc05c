"""Fetches adapters from S3, folders and archives. Each version is fetched once."""

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.archive import unpack
from loraplex.adapters.cache import cached, digest_of
from loraplex.adapters.files import (
    ARCHIVE,
    CHUNK,
    FILES,
    PICKLE,
    Progress,
    ResolvedSource,
    SourceLimits,
    check,
    check_size,
    reason_of,
    sizes_of,
)
from loraplex.bundle import CONTRACT
from loraplex.errors import AdapterError
from loraplex.io_yaml import IO_YAML

# The beginnings of all FILES and of the pickle.
PREFIXES = ("adapter_", "added_tokens", "chat_template", CONTRACT, IO_YAML, "special_tokens", "tokenizer")
ATTEMPTS = 5  # at resuming a download that was cut, and at fetching objects that change meanwhile


@dataclass(frozen=True, slots=True)
class _Object:
    """An S3 object at one moment; `etag` identifies its content."""

    bucket: str
    key: str
    etag: str
    size: int

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


def from_s3(bucket: str, key: str, cache_dir: Path, limits: SourceLimits, progress: Progress | None) -> ResolvedSource:
    """Return the adapter in a folder or an archive. Raises AdapterError where fetching fails."""
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
        # A session of its own: threads may not share boto3's default one, which does not read AWS_REGION either.
        session = boto3.session.Session(region_name=os.environ.get("AWS_REGION") or None)
        client = session.client("s3", config=Config(connect_timeout=10))
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
                path = cached(cache_dir, source, version, build)
            except ClientError as exc:
                if exc.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                    raise
                continue  # an object changed since it was listed
            check(source, sizes_of(path), limits)
            return ResolvedSource(path=path, source=source, remote=True)
    except (AdapterError, OSError):
        raise
    except Exception as exc:  # botocore raises many types, and others where the endpoint is not a URL or not S3
        status = exc.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(exc, ClientError) else None
        if status == 404:
            remedy = "check the bucket and the key"
        elif (status is not None and status < 500) or "Credentials" in type(exc).__name__:
            remedy = "check AWS_PROFILE or the AWS keys; they need s3:GetObject and s3:ListBucket"
        else:
            remedy = "check the network, AWS_REGION and AWS_ENDPOINT_URL; then try again: the download resumes"
        raise AdapterError(source, f"cannot be fetched from S3: {reason_of(exc)}", remedy=remedy) from None
    raise AdapterError(source, "changes faster than it can be fetched", remedy="try again when the upload is complete")


def _list(client: Any, bucket: str, key: str) -> list[_Object]:
    if key.endswith(ARCHIVE):
        head = client.head_object(Bucket=bucket, Key=key)
        return [_Object(bucket, key, head["ETag"], head["ContentLength"])]
    # List instead of asking by name: a role that may not list gets the same answer for "missing" and "forbidden", and
    # a missing contract must not go unnoticed.
    folder = f"{key}/" if key else ""
    pages = [client.list_objects_v2(Bucket=bucket, Prefix=folder, Delimiter="/")]
    if pages[0].get("IsTruncated"):  # by prefix, because the folder may hold a million other objects
        pages = [
            page
            for start in PREFIXES
            for page in client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=f"{folder}{start}", Delimiter="/"
            )
        ]
    found = [
        _Object(bucket, one["Key"], one["ETag"], one["Size"]) for page in pages for one in page.get("Contents", ())
    ]
    return sorted((one for one in found if one.name in (*FILES, PICKLE)), key=lambda one: one.key)


def _download(client: Any, objects: Sequence[_Object], work: Path, progress: Progress | None) -> None:
    """Fetch `objects` into `work`, through `.part` files beside it.

    The `.part` files survive a failure and are named after key and etag, so that a later call fetches only the rest."""
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError

    folder = work.parent / "parts"
    folder.mkdir(exist_ok=True)
    parts = {folder / f"{digest_of(f'{one.key} {one.etag}')}.part": one for one in objects}
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
            except BotoCoreError as exc:  # the download was cut or damaged
                if isinstance(exc, FlexibleChecksumError):
                    part.write_bytes(b"")
                if attempt == ATTEMPTS - 1:
                    raise
        if part.stat().st_size != one.size:
            raise AdapterError(
                f"s3://{one.bucket}/{one.key}",
                f"came with {part.stat().st_size:,} bytes instead of {one.size:,}",
                remedy="try again; if it happens again, check the proxies between this machine and S3",
            )
        before += one.size
    for part, one in parts.items():
        part.rename(work / one.name)
