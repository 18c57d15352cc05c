"""Settings that are origins, networks and paths."""

import ipaddress
import re

from loraplex.problems import wrong

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


def valid_origin(value: str) -> str:
    """Return an origin as browsers send it. Raises pydantic's error for any other text."""
    value = value.lower()
    if value in ("*", "null"):
        return value
    if not ORIGIN.fullmatch(value):
        raise wrong("is no origin", "write the scheme and the host without a path, such as https://app.example.com")
    return value.removesuffix(":443" if value.startswith("https:") else ":80")


def valid_network(value: str) -> str:
    """Return an address or a network. Raises pydantic's error for any other text."""
    try:
        return str(ipaddress.ip_network(value, strict=False))
    except ValueError:
        raise wrong(
            "is no address and no network", "write an address or a network, such as 10.0.0.5 or 10.0.0.0/8"
        ) from None


def valid_root_path(value: str) -> str:
    """Return a path without a slash at its end. Raises pydantic's error for any other text."""
    value = value.rstrip("/")
    if value and not ROOT_PATH.fullmatch(value):
        raise wrong("is no path", "write a path such as /llm, of letters, digits, '.', '_', '~' and '-'")
    return value
