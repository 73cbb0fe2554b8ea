"""Values in messages: short, and in one line."""

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
    """A value as messages show it: one line, not too long."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python does not write numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def short(value: Any) -> str:
    """A foreign value in one short line of ASCII."""
    try:
        said = str(tuple(value.shape)) if hasattr(value, "shape") else ascii(value)  # a tensor
        said = said[1:-1] if isinstance(value, str) else said
    except (ValueError, RecursionError):  # thousands of digits, thousands of levels
        said = "..."
    return " ".join(said.split())[:60]


def printable(value: Any) -> str:
    """A value as text that a screen can show: what comes from a file may hold anything."""
    text = str(value)
    return text if text.isprintable() else ascii(text)
