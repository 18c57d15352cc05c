"""Turns a source (a folder, an archive, `hf://…` or `s3://…`) into a verified local folder with a PEFT adapter. Knows
which files are accepted, not what they mean."""

import re
from collections.abc import Sequence
from pathlib import Path

from loraplex.adapters.files import LIMITS, SHAPES, Progress, ResolvedSource, SourceLimits, reason_of
from loraplex.adapters.hub import from_hub
from loraplex.adapters.local import from_roots
from loraplex.adapters.s3 import from_s3
from loraplex.errors import AdapterError

LONGEST = 4096  # maximum characters of a source
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
    """Return the adapter that `source` names, as a verified local folder. Raises AdapterError, whatever is wrong.

    roots:      a path must lie below one of them, after following symlinks. A relative path is tried below each.
    cache_dir:  holds what is unpacked or comes from S3. Nothing in it is removed: each version has its own folder,
                which may still be in use. Files from the hub stay in the hub's own cache.
    progress:   is called with the bytes so far and in all.
    Several threads and processes may call this at the same time."""
    given = str(source)
    if not given or len(given) > LONGEST or not given.isprintable():  # NUL, line breaks, lone surrogates
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
    except OSError as exc:  # unreadable, or no space for the cache
        raise AdapterError(
            given, f"cannot be read or stored: {reason_of(exc)}", remedy="check permissions and disk space"
        ) from None
