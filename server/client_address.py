"""Which server a client of the OpenAI API talks to, and with which key: the same rules for all that ask for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from .options import OptionError

DEFAULT_BASE_URL = "http://127.0.0.1:8000"


def checked_address(where: str, text: str) -> str:
    """An http(s) address, without slashes at its end. What could carry a secret is refused, and not repeated.

    `where` says in errors where it was given. Raises OptionError.
    """
    text = text.strip()
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        shown = "" if "@" in text else f" (given: {text[:80]!r})"
        raise OptionError(f"{where}: expected an address such as {DEFAULT_BASE_URL}{shown}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise OptionError(f"{where}: expected an address without user name, query or fragment; give keys as --api-key")
    return text.rstrip("/")


def with_version(address: str) -> str:
    """/v1 is added where the address has no path of its own."""
    return address if urlsplit(address).path.strip("/") else f"{address}/v1"


def find_key(given: str | None, environ: Mapping[str, str]) -> str | None:
    """The first that there is: --api-key, OCTAVO_API_KEY, OPENAI_API_KEY. Raises OptionError.

    A server takes several keys from its OCTAVO_API_KEY; any of them will do.
    """
    for where, text in (
        ("--api-key", given or ""),
        ("OCTAVO_API_KEY", environ.get("OCTAVO_API_KEY", "").split(",")[0]),
        ("OPENAI_API_KEY", environ.get("OPENAI_API_KEY", "")),
    ):
        if key := text.strip():
            return checked_key(where, key)
    return None


def checked_key(where: str, key: str) -> str:
    """Raises OptionError, which does not repeat the key."""
    if not re.fullmatch(r"[!-~]+", key):
        raise OptionError(f"{where}: a key consists of visible ASCII characters without spaces")
    return key
