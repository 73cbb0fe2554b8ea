"""Parts of messages: values in one short line, suggestions of the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean NEAREST?", or all known names if none is near; nothing if none are known."""
    names = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), names, n=1)
    if close:
        return f"; did you mean {names[close[0]]}?"
    return f"; available: {', '.join(names.values())}" if names else ""


def shown(value: Any) -> str:
    """Shorten a value to one line of at most 80 characters."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python does not write numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def short(value: Any) -> str:
    """Shorten a value from a file to one line of at most 60 ASCII characters."""
    try:
        said = str(tuple(value.shape)) if hasattr(value, "shape") else ascii(value)  # a tensor
        said = said[1:-1] if isinstance(value, str) else said
    except (ValueError, RecursionError):  # thousands of digits, thousands of levels
        said = "..."
    return " ".join(said.split())[:60]


def printable(value: Any) -> str:
    """Return a value as printable text: values from files may hold control characters."""
    text = str(value)
    return text if text.isprintable() else ascii(text)
