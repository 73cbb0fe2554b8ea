"""Differences between two nested settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from relay_diffusion.utils.messages import shorten


def differences(there: Any, here: Any, key: str = "", absent: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, stored value, present value) of each leaf that differs; a missing part is one leaf.

    `absent` stands for the value of a key that one side lacks.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for part in sorted({*there, *here}):
            name = f"{key}.{part}" if key else str(part)
            yield from differences(there.get(part, absent), here.get(part, absent), name, absent)
    elif there != here:
        yield key, there, here


def first_difference(there: Any, here: Any) -> str:
    """Describe the first difference, as "KEY is A there, B here"."""
    key, before, now = next(differences(there, here))
    if isinstance(now, Mapping):
        return f"{key} is missing there"
    if isinstance(before, Mapping):
        return f"{key} is there, but not here"
    return f"{key} is {shorten(before)} there, {shorten(now)} here"
