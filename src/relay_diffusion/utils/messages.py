"""Parts of messages: shortened values, suggestions, differences of settings."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN_NAMES = 5  # of many
ABSENT = "not set"  # stands for the value of a missing setting


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Suggest the nearest known name, as "; did you mean NEAREST?".

    If no name is near: `otherwise`, or by default "; available: ..." with all known names.
    """
    names = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), names, n=1)
    if close:
        return f"; did you mean {names[close[0]]}?"
    if otherwise is not None:
        return otherwise
    return f"; available: {', '.join(names.values())}" if names else ""


def one_line(error: BaseException) -> str:
    """Return the message of another library's error in one line.

    An error without a message gives its class name.
    """
    return " ".join(str(error).split()) or type(error).__name__


def shorten(value: Any, length: int = 80) -> str:
    """Return a value as one printable line of at most `length` characters.

    A tensor gives its shape.
    """
    try:
        text = " ".join(str(tuple(value.shape) if hasattr(value, "shape") else value).split())
    except (ValueError, RecursionError):  # numbers of thousands of digits, thousands of levels
        return "..."
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= length else f"{text[: length - 3]}..."


def shown_path(path: str | os.PathLike[str]) -> str:
    """Return a path as messages show it.

    Relative inside the working directory, else absolute.
    """
    relative = os.path.relpath(path)
    return os.path.normpath(Path(path).absolute()) if Path(relative).parts[:1] == (os.pardir,) else relative


def first_names(names: Sequence[str]) -> str:
    """List the first few names, separated by commas."""
    more = ", ..." if len(names) > SHOWN_NAMES else ""
    return ", ".join(shorten(name) for name in names[:SHOWN_NAMES]) + more


def override(key: str, value: str) -> str:
    """Return an override as it is written on a command line.

    Hydra needs quotes around special characters, and the shell around these.
    """
    plain = re.fullmatch(r"[\w./-]+|\[[\w,]+\]", value)
    text = value if plain else "'" + re.sub(r"(\\*)'", r"\1\1\'", value) + "'"
    return shlex.quote(f"{key}={text}")


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) for each differing leaf of nested settings.

    A missing part counts as one leaf.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for part in sorted({*before, *now}):
            name = f"{key}.{part}" if key else str(part)
            yield from differences(before.get(part, ABSENT), now.get(part, ABSENT), name)
    elif before != now:
        yield key, before, now


def setting_text(value: Any, length: int = 80) -> str:
    """Return a setting as one short line.

    A component gives its class name.
    """
    target = value.get("_target_") if isinstance(value, Mapping) else None
    return shorten(target.rpartition(".")[2] if isinstance(target, str) else value, length)


def first_difference(before: Any, now: Any, options: Mapping[str, str] | None = None) -> str:
    """Describe the first difference, as "KEY was A, is B".

    options: options of the command to name instead of keys.
    """
    key, old, new = next(differences(before, now))
    return f"{(options or {}).get(key, key)} was {setting_text(old)}, is {setting_text(new)}"
