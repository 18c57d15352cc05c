"""The manifest of an artifact: its base, its adapters, and the size and SHA-256 of each file."""

import json
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from loraplex.errors import BundleError, quoted

MANIFEST = "loraplex-manifest.json"
FORMAT: Final = 1
MAX_BYTES = 64 * 2**20  # such a manifest describes some 400,000 files


class FileEntry(BaseModel):
    """A file's size and hash, which identify its content."""

    model_config = ConfigDict(frozen=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class AdapterEntry(BaseModel):
    """An adapter of the artifact.

    version:  the id that verdicts show. It may differ on the endpoint for an adapter that repeats tensors of the base.
    labels:   None where the adapter has no contract and no head: its likeliest token is the answer.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    kinds: tuple[str, ...]
    labels: tuple[str, ...] | None
    rank: int


def _check_name(name: str) -> str:
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("a file's name leads elsewhere")
    return name


class Manifest(BaseModel):
    """The manifest. files: every file of the artifact, by name, but for the manifest itself."""

    model_config = ConfigDict(frozen=True)

    format_version: Literal[1] = FORMAT
    loraplex_version: str
    base_name: str | None
    adapters: tuple[AdapterEntry, ...]
    files: dict[Annotated[str, AfterValidator(_check_name)], FileEntry] = Field(min_length=1)

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON: the same bytes for the same content."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def read_manifest(source: object, given: bytes) -> Manifest:
    """Return the manifest that an artifact holds. Raises BundleError where it is damaged or of a newer format."""
    try:
        content = json.loads(given)
        version = content["format_version"]
        if version == FORMAT:
            return Manifest.model_validate(content)
    except (ValueError, LookupError, TypeError, RecursionError):  # pydantic's error is a ValueError
        raise BundleError(source, f"its {MANIFEST} is damaged", remedy="pack or copy the artifact again") from None
    raise BundleError(
        source,
        f"its {MANIFEST} has the format {quoted(version)}, and this Loraplex reads {FORMAT}",
        remedy="verify it with the version of Loraplex that packed it",
    )
