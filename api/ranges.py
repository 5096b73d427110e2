"""Byte ranges (RFC 9110, section 14): one range; of several the whole file is sent, as the RFC allows."""

from __future__ import annotations

import re
from dataclasses import dataclass

ONE_RANGE = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.ASCII | re.IGNORECASE)
LARGEST = 10**18  # no file is so large; Python reads no integer of more than 4300 digits


class Unsatisfiable(ValueError):
    """The range begins behind the end of the file."""


@dataclass(frozen=True)
class Span:
    """`length` bytes from `start` on."""

    start: int
    length: int


def span_of(header: str | None, size: int) -> Span | None:
    """The part of a file of `size` bytes that a Range header asks for; None: all of it. Raises Unsatisfiable."""
    found = ONE_RANGE.fullmatch(header) if header is not None else None
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        length = min(_number(last), size)
        if length == 0:
            raise Unsatisfiable
        return Span(size - length, length)
    start, end = _number(first), _number(last) if last else size - 1
    if last and end < start:
        return None
    if start >= size:
        raise Unsatisfiable
    return Span(start, min(end, size - 1) - start + 1)


def _number(digits: str) -> int:
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= 18 else LARGEST
