"""Where adapters come from: a folder, an archive, `hf://…` or `s3://…` -> a verified local folder with a PEFT adapter's
files. Knows which bytes are let in, not what they mean."""

import re
from collections.abc import Sequence
from pathlib import Path

from loraplex.adapters.files import LIMITS, SHAPES, Progress, ResolvedSource, SourceLimits, reason_of
from loraplex.adapters.hub import from_hub
from loraplex.adapters.local import from_roots
from loraplex.adapters.s3 import from_s3
from loraplex.errors import AdapterError

LONGEST = 4096  # characters that name a source
FORMS = {
    "hf": re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<folder>[\w./-]+?))?/?(@(?P<revision>[\w./-]+))?", re.ASCII),
    "s3": re.compile(r"(?P<bucket>[A-Za-z0-9._-]{3,63})(/(?P<key>[^?#]*?))?/?"),
}


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
            return from_roots(given, roots, cache_dir, limits)
        place = FORMS[scheme].fullmatch(rest) if scheme in FORMS else None
        named = {key: value for key, value in place.groupdict().items() if value} if place else {}
        if not named or any(part in ("", ".", "..") for value in named.values() for part in value.split("/")):
            shown = f"{scheme}://…" if scheme.isalnum() else "…://…"  # the rest may hold a password
            raise AdapterError(
                shown, "is not an address that adapters are read from", remedy=f"give {SHAPES}; no user, no query"
            )
        if scheme == "hf":
            return from_hub(named["repo"], named.get("folder"), named.get("revision"), limits, progress)
        return from_s3(named["bucket"], named.get("key", ""), cache_dir, limits, progress)
    except OSError as exc:  # unreadable, or no room in the cache
        raise AdapterError(
            given, f"cannot be read or kept: {reason_of(exc)}", remedy="check permissions and disk space"
        ) from None
