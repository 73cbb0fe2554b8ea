"""Parts of messages: values in one short line, suggestions of the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Suggest the nearest name, as "; did you mean NEAREST?".

    Without a near one: `otherwise`, or by default "; available: ..." with all known names.
    """
    names = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), names, n=1)
    if close:
        return f"; did you mean {names[close[0]]}?"
    if otherwise is not None:
        return otherwise
    return f"; available: {', '.join(names.values())}" if names else ""


def one_line(error: Exception) -> str:
    """Return the message of an error of another library in one line, or its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shorten(value: Any, length: int = 80) -> str:
    """Return a value as one printable line of at most `length` characters; of a tensor its shape."""
    try:
        text = " ".join(str(tuple(value.shape) if hasattr(value, "shape") else value).split())
    except (ValueError, RecursionError):  # numbers of thousands of digits, thousands of levels
        return "..."
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= length else f"{text[: length - 3]}..."
