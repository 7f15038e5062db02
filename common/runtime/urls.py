"""Server addresses as they may appear in messages and logs."""

from __future__ import annotations

from urllib.parse import urlsplit


def redacted(url: str) -> str:
    """The address, or several separated by commas, without user and password."""
    return ",".join(_redacted_one(part) for part in url.split(","))


def _redacted_one(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.rpartition("@")[2]
    if "@" not in parts.netloc:
        return url
    return parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]).geturl()
