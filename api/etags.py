"""Entity tags (RFC 9110, section 8.8.3)."""

from __future__ import annotations


def matches(if_none_match: str, etag: str) -> bool:
    """Whether a list of tags, or `*`, names `etag`: the weak comparison."""
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in if_none_match.split(","))
