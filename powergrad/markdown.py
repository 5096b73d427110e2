"""Text that others wrote, made safe to stand in Markdown."""

from __future__ import annotations

import html
import re


def plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would act on."""
    one_line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(one_line, quote=False))
