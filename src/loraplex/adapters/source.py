"""Turns a source (a folder, an archive, `hf://…` or `s3://…`) into a verified local folder with a PEFT adapter. Knows
which files are accepted, not what they mean."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from loraplex.adapters.files import ARCHIVE, LIMITS, SHAPES, Progress, ResolvedSource, SourceLimits, reason_of
from loraplex.adapters.hub import from_hub
from loraplex.adapters.local import from_anywhere, from_roots
from loraplex.adapters.s3 import from_s3
from loraplex.errors import AdapterError, quoted

LONGEST = 4096  # maximum characters of a source
FORMS = {
    "hf": re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<folder>[\w./-]+?))?/?(@(?P<revision>[\w./-]+))?", re.ASCII),
    "s3": re.compile(r"(?P<bucket>[A-Za-z0-9._-]{3,63})(/(?P<key>[^?#]*?))?/?"),
}


def resolve_source(
    source: str | Path,
    *,
    roots: Sequence[Path] | None,
    cache_dir: Path,
    limits: SourceLimits = LIMITS,
    progress: Progress | None = None,
) -> ResolvedSource:
    """Return the adapter that `source` names, as a verified local folder. Raises AdapterError, whatever is wrong.

    roots:      a path must lie below one of them, after following symlinks. A relative path is tried below each. None:
                whoever runs the server names the source. A path may lie anywhere, and where there is none, `org/name`
                is an id on the hub. A client's mistyped path must not become a stranger's adapter.
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
            if roots is not None:
                return from_roots(given, roots, cache_dir, limits)
            return from_anywhere(given, cache_dir, limits) or _from_hub_id(given, limits, progress)
        named = _parts(scheme, rest)
        if not named:
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


def _parts(scheme: str, rest: str) -> dict[str, str]:
    """Return the parts of an address behind its scheme; none where it has another form."""
    place = FORMS[scheme].fullmatch(rest) if scheme in FORMS else None
    named = {key: value for key, value in place.groupdict().items() if value} if place else {}
    is_clear = not any(part in ("", ".", "..") for value in named.values() for part in value.split("/"))
    return named if is_clear else {}


def _from_hub_id(given: str, limits: SourceLimits, progress: Progress | None) -> ResolvedSource:
    """Return the adapter of an id on the hub, for a path where nothing is."""
    path = os.path.abspath(os.path.expanduser(given))
    looked = "no such folder or archive" + ("" if path == given else f" ({quoted(path)})")
    named = _parts("hf", given)
    if not named or "folder" in named or given.endswith(("/", ARCHIVE)):
        raise AdapterError(
            given, f"{looked}, and it is no hub id org/name[@revision]", remedy=f"check the path, or give {SHAPES}"
        )
    try:
        return from_hub(named["repo"], None, named.get("revision"), limits, progress)
    except AdapterError as exc:
        raise AdapterError(given, f"{looked}; {exc.message}", remedy=f"check the path, or {exc.remedy}") from None
