"""Progress bars on a terminal, occasional plain lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # a log gets one line in this many seconds
QUIET = "RELAY_DIFFUSION_QUIET"  # 1: no progress at all


class Advance:
    """Counter of finished units of work, possibly fractions.

    `__call__(n, note)` adds n, `to(n, note)` sets n; both call `show(done, note)`.
    """

    def __init__(self, done: float, show: Callable[[float, str], None]) -> None:
        self.done, self.note, self._show = done, "", show

    def __call__(self, count: float = 1, note: str | None = None) -> None:
        self.to(self.done + count, note)

    def to(self, done: float, note: str | None = None) -> None:
        """Set the number of finished units."""
        self.done = done
        self.note = self.note if note is None else note
        self._show(self.done, self.note)


class _PlainLines:
    """Lines for a log file, with an estimate of the remaining time.

    The first report starts the clock: compilation and other one-time work come before it.
    """

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self._first: tuple[float, float] | None = None  # time and finished units of the first report
        self._next = time.monotonic()
        self._complete = False  # the last line is printed

    def show(self, done: float, note: str) -> None:
        """Print a line, at most one in PLAIN_SECONDS.

        The end gets exactly one.
        """
        now = time.monotonic()
        self._first = self._first or (now, done)
        if self._complete or (now < self._next and done < self.total):
            return
        self._complete = done >= self.total
        self._next = now + PLAIN_SECONDS
        parts = [f"{self.description}: {int(done):,}/{self.total:,} {self.unit}"]
        began, before = self._first
        if before < done < self.total:
            left = (now - began) * (self.total - done) / (done - before)
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        print("  ".join(filter(None, [*parts, note])), flush=True)


@contextmanager
def progress(
    description: str, total: int, unit: str = "images", done: int = 0, enabled: bool = True
) -> Iterator[Advance]:
    """Show progress towards `total` units.

    Yields an `Advance` to call with each finished count. done: units finished earlier, as in a resumed run.
    Shows nothing if disabled (ranks above 0) or with RELAY_DIFFUSION_QUIET=1.
    """
    if not enabled or os.environ.get(QUIET) == "1":
        yield Advance(done, lambda *_: None)
    elif not sys.stdout.isatty():
        yield Advance(done, _PlainLines(description, total, unit).show)
    else:
        texts = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[unit]", "fields[note]")]
        columns = (texts[0], BarColumn(), MofNCompleteColumn(), texts[1], TimeRemainingColumn(), texts[2])
        with Progress(*columns, console=Console()) as bar:
            task = bar.add_task(description, total=total, completed=done, unit=unit, note="")
            yield Advance(done, lambda done, note: bar.update(task, completed=done, note=note))
