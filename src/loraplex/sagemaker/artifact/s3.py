"""Writes to S3 and reads from it: one object, or the objects below a prefix."""

import os
import re
import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from loraplex.adapters.files import CHUNK, reason_of
from loraplex.errors import BundleError, ConfigurationError
from loraplex.sagemaker.artifact.interrupts import held

ADDRESS = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>[^?#]+)")
PART_BYTES = 16 * 2**20  # of a multipart upload, if that makes few enough parts
MAX_PARTS = 10_000  # S3's limit
UPLOADS = 4  # parts that are uploaded at the same time; each is in memory
RIGHTS = "s3:PutObject, s3:GetObject, s3:ListBucket, s3:DeleteObject and s3:AbortMultipartUpload"
SIGN_IN = "sign in to AWS again, such as with `aws sso login`, and run the command again"
WHO = f"check AWS_PROFILE or the AWS keys; they need {RIGHTS}"
NO_BUCKET = "correct the bucket's name, or make the bucket: aws s3 mb s3://BUCKET"
REGION = "set AWS_REGION to the bucket's region"
NETWORK = "check the network, AWS_REGION and AWS_ENDPOINT_URL, and run the command again"
# AWS's code -> the remedy. The answer to a HEAD request has no body, so its code is the status.
REMEDIES = {
    "NoSuchBucket": NO_BUCKET,
    "404": NO_BUCKET,
    "NoSuchKey": "correct the key",
    "AccessDenied": WHO,
    "403": WHO,
    "AllAccessDisabled": WHO,
    "InvalidAccessKeyId": WHO,
    "SignatureDoesNotMatch": WHO,
    "ExpiredToken": SIGN_IN,
    "ExpiredTokenException": SIGN_IN,
    "InvalidToken": SIGN_IN,
    "TokenRefreshRequired": SIGN_IN,
    "400": f"{SIGN_IN}; or {REGION}",
    "301": REGION,
    "PermanentRedirect": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "RequestTimeTooSkewed": "set this machine's clock, and run the command again",
}
# botocore's exceptions that come before any call.
BEFORE_A_CALL = {
    "NoCredentialsError": WHO,
    "PartialCredentialsError": WHO,
    "ProfileNotFound": WHO,
    "NoRegionError": REGION,
    "UnauthorizedSSOTokenError": SIGN_IN,
    "SSOTokenLoadError": SIGN_IN,
    "TokenRetrievalError": SIGN_IN,
    "CredentialRetrievalError": SIGN_IN,
}


class Place(NamedTuple):
    """An object in S3, or the objects whose keys begin with `key`."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def place_of(address: str) -> Place:
    """Return the place of an address `s3://bucket/key`. Raises BundleError for another form."""
    match = ADDRESS.fullmatch(address)
    if match is None or any(part in ("", ".", "..") for part in match["key"].removesuffix("/").split("/")):
        raise BundleError(address, "is no address in S3", remedy="write s3://bucket/folder/name.tar.gz")
    return Place(match["bucket"], match["key"])


def connect(place: Place) -> Any:
    """Return boto3's client for S3. Raises ConfigurationError where boto3 is missing, or is not configured."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ConfigurationError(
            place, "S3 needs boto3, which is missing", remedy="pip install 'loraplex[aws]'"
        ) from None
    with calling(place):
        # A session of its own: threads may not share boto3's default one, which does not read AWS_REGION either.
        session = boto3.session.Session(region_name=os.environ.get("AWS_REGION") or None)
        return session.client("s3", config=Config(connect_timeout=10, max_pool_connections=UPLOADS))


@contextmanager
def calling(place: Place, left: str = "") -> Iterator[None]:
    """Turn what boto3 raises into a ConfigurationError, which names the call, AWS's code and the remedy. left: what is
    left behind if the call fails, as a remedy of its own."""
    try:
        yield
    except Exception as exc:
        if not is_botocores(exc):
            raise
        response, call = getattr(exc, "response", None), getattr(exc, "operation_name", None)
        if isinstance(response, dict) and call is not None:
            code = str(response.get("Error", {}).get("Code", "unknown"))
            what = f"AWS refuses {call} with {code}: {response.get('Error', {}).get('Message') or 'no message'}"
            remedy = REMEDIES.get(code, NETWORK)
        else:
            what = f"S3 cannot be asked: {type(exc).__name__}: {reason_of(exc)}"
            remedy = BEFORE_A_CALL.get(type(exc).__name__, NETWORK)
        raise ConfigurationError(place, what, remedy=f"{left}; {remedy}" if left else remedy) from None


def is_botocores(exc: Exception) -> bool:
    """Return whether boto3 or what it uses raised the exception. Asks the module's name: boto3 may be missing."""
    return type(exc).__module__.startswith(("botocore", "boto3", "urllib3"))


def part_bytes(num_bytes: int) -> int:
    """Return the size of a multipart upload's parts, for an object of at most `num_bytes`."""
    needed = -(-num_bytes // MAX_PARTS)
    return max(PART_BYTES, -(-needed // 2**20) * 2**20)


class Upload:
    """One object that is uploaded in parts while it is written. It appears when it is complete."""

    def __init__(self, client: Any, place: Place, num_bytes: int) -> None:
        """num_bytes: at most so many are written."""
        self._client, self._place = client, place
        self._target = {"Bucket": place.bucket, "Key": place.key}
        self._part_bytes = part_bytes(num_bytes)
        self._buffer = bytearray()
        self._parts: list[dict[str, Any]] = []
        self._waiting: deque[Future[dict[str, Any]]] = deque()
        self._pool = ThreadPoolExecutor(UPLOADS, "loraplex-upload")
        self._id: str | None = None

    def begin(self) -> None:
        """Make the upload. Where this is interrupted, `rollback` removes it."""
        with calling(self._place):
            # In a thread: an interrupt in the middle of the call would leave an upload whose id nobody knows.
            with held():
                making = self._pool.submit(self._make)
            making.result()

    def write(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= self._part_bytes:
            self._send(bytes(self._buffer[: self._part_bytes]))
            del self._buffer[: self._part_bytes]

    def commit(self) -> None:
        if self._buffer or (not self._waiting and not self._parts):
            self._send(bytes(self._buffer))
        while self._waiting:
            self._take()
        with calling(self._place):
            self._client.complete_multipart_upload(
                **self._target, UploadId=self._id, MultipartUpload={"Parts": self._parts}
            )
        self._id = None
        self._pool.shutdown()

    def rollback(self) -> None:
        """Remove the parts. Waits for those under way, which would stay otherwise. Raises ConfigurationError where they
        cannot be removed, and says how to remove them."""
        self._pool.shutdown(cancel_futures=True)
        if self._id is None:
            return
        upload_id, self._id = self._id, None
        command = (
            f"aws s3api abort-multipart-upload --bucket {self._place.bucket} --key {shlex.quote(self._place.key)} "
            f"--upload-id {shlex.quote(upload_id)}"
        )
        with calling(self._place, f"an unfinished upload is left; remove it: {command}"):
            self._client.abort_multipart_upload(**self._target, UploadId=upload_id)

    def _make(self) -> None:
        self._id = self._client.create_multipart_upload(**self._target, ChecksumAlgorithm="SHA256")["UploadId"]

    def _send(self, data: bytes) -> None:
        if len(self._waiting) == UPLOADS:
            self._take()
        self._waiting.append(self._pool.submit(self._upload, len(self._parts) + len(self._waiting) + 1, data))

    def _take(self) -> None:
        with calling(self._place):
            self._parts.append(self._waiting.popleft().result())

    def _upload(self, number: int, data: bytes) -> dict[str, Any]:
        answer = self._client.upload_part(
            **self._target, UploadId=self._id, PartNumber=number, Body=data, ChecksumAlgorithm="SHA256"
        )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": answer["ChecksumSHA256"]}


class S3Object:
    """A Stream to one object."""

    def __init__(self, place: Place, *, replaces: bool = False) -> None:
        """replaces: whether an object of that key is replaced; otherwise it is an error."""
        self._place, self._replaces = place, replaces
        self._client = connect(place)
        self._upload: Upload | None = None

    def check(self, num_bytes: int) -> None:
        check_bucket(self._client, self._place)
        if not self._replaces and self._place.key in keys_below(self._client, self._place, most=1):
            raise BundleError(self._place, "exists already", remedy="give --force to replace it, or name another key")

    def begin(self, num_bytes: int) -> None:
        self._upload = Upload(self._client, self._place, num_bytes)
        self._upload.begin()

    def write(self, data: bytes) -> None:
        assert self._upload is not None, "begin() comes first"
        self._upload.write(data)

    def commit(self) -> None:
        assert self._upload is not None, "begin() comes first"
        self._upload.commit()

    def rollback(self) -> None:
        if self._upload is not None:
            self._upload.rollback()


class S3Prefix:
    """An Output that writes one object for each file, below a prefix that ends in "/"."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._client = connect(place)
        self._written: list[str] = []
        self._upload: Upload | None = None

    def check(self, num_bytes: int) -> None:
        check_bucket(self._client, self._place)
        if keys_below(self._client, self._place, most=1):
            raise BundleError(
                self._place, "holds objects already", remedy="name a new prefix: nothing is written over or beside"
            )

    def begin(self, num_bytes: int) -> None:
        pass

    def add(self, name: str, size: int, chunks: Iterator[bytes]) -> None:
        place = Place(self._place.bucket, self._place.key + name)
        self._written.append(place.key)
        if size <= PART_BYTES:
            body = b"".join(chunks)
            with calling(place):
                self._client.put_object(Bucket=place.bucket, Key=place.key, Body=body, ChecksumAlgorithm="SHA256")
            return
        self._upload = Upload(self._client, place, size)
        self._upload.begin()
        for chunk in chunks:
            self._upload.write(chunk)
        self._upload.commit()
        self._upload = None

    def commit(self) -> None:
        self._written.clear()

    def rollback(self) -> None:
        upload, self._upload = self._upload, None
        try:
            if upload is not None:
                upload.rollback()
        finally:
            command = f"aws s3 rm --recursive {shlex.quote(str(self._place))}"
            while self._written:
                with calling(self._place, f"up to {len(self._written)} objects are left; remove them: {command}"):
                    self._client.delete_object(Bucket=self._place.bucket, Key=self._written[-1])
                self._written.pop()


def check_bucket(client: Any, place: Place) -> None:
    with calling(place):
        client.head_bucket(Bucket=place.bucket)


def keys_below(client: Any, place: Place, *, most: int) -> Sequence[str]:
    """Return the first keys, `most` of them, that begin with the place's key; in order, so the key itself comes first.

    Lists instead of asking by name: without the right to list, "missing" and "forbidden" get the same answer."""
    with calling(place):
        page = client.list_objects_v2(Bucket=place.bucket, Prefix=place.key, MaxKeys=most)
    return [one["Key"] for one in page.get("Contents", ())]


def objects_below(place: Place) -> tuple[int, Iterator[tuple[str, Iterator[bytes]]]]:
    """Return the bytes below a prefix that ends in "/", and (key without the prefix, content) of each object."""
    client = connect(place)
    check_bucket(client, place)
    with calling(place):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=place.key)
        listed = {one["Key"]: int(one["Size"]) for page in pages for one in page.get("Contents", ())}
    listed.pop(place.key, None)  # a console's folder is an object of its own

    def objects() -> Iterator[tuple[str, Iterator[bytes]]]:
        for key in listed:
            body = client.get_object(Bucket=place.bucket, Key=key)["Body"]
            yield key.removeprefix(place.key), body.iter_chunks(CHUNK)

    return sum(listed.values()), objects()


def open_object(place: Place) -> tuple[int, Any]:
    """Return an object's bytes, and its content as a file to read."""
    client = connect(place)
    check_bucket(client, place)
    with calling(place):
        answer = client.get_object(Bucket=place.bucket, Key=place.key)
    return int(answer["ContentLength"]), answer["Body"]
