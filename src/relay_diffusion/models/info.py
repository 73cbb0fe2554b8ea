"""What is known about a stage besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageInfo:
    """What is known about a stage besides its weights.

    config: the stage config from which a checkpoint rebuilds it. class_names: names of the classes, in order.
    origin: the file and weights that a loaded stage came from, and those of its guide. images_seen: images of its
    training so far.
    """

    config: dict[str, Any] | None = None
    class_names: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    images_seen: int = 0
