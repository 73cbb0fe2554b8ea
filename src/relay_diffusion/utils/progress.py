"""Progress bars on a terminal, occasional plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # a log gets one line in this many seconds
QUIET = "RELAY_DIFFUSION_QUIET"  # 1: no progress at all


class Advance:
    """Count finished units of work; `__call__(n, note)` advances the bar by n."""

    def __init__(self, description: str, total: int, unit: str, done: int = 0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = done, ""

    def __call__(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = self.note if note is None else note
        self.show()

    def show(self) -> None:
        """Display the current state; a disabled bar shows nothing."""


class _PlainAdvance(Advance):
    def __init__(self, description: str, total: int, unit: str, done: int = 0) -> None:
        super().__init__(description, total, unit, done)
        self._next = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now >= self._next or self.done >= self.total:
            self._next = now + PLAIN_SECONDS
            note = f"  {self.note}" if self.note else ""
            print(f"{self.description}: {self.done:,}/{self.total:,} {self.unit}{note}", flush=True)


class _RichAdvance(Advance):
    def __init__(self, bar: Progress, description: str, total: int, unit: str, done: int = 0) -> None:
        super().__init__(description, total, unit, done)
        self._bar, self._task = (
            bar,
            bar.add_task(description, total=total, completed=done, note="", unit=unit),
        )

    def show(self) -> None:
        self._bar.update(self._task, completed=self.done, note=self.note)


@contextmanager
def progress(
    description: str, total: int, unit: str = "images", done: int = 0, enabled: bool = True
) -> Iterator[Advance]:
    """Show progress towards `total` units; yields an `Advance` to call with each finished count.

    `done` units are counted as finished already (a continued run). Disabled (ranks above 0), or with
    RELAY_DIFFUSION_QUIET=1, it shows nothing.
    """
    if not enabled or os.environ.get(QUIET) == "1":
        yield Advance(description, total, unit, done)
        return
    if not sys.stdout.isatty():
        yield _PlainAdvance(description, total, unit, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console()) as bar:
        yield _RichAdvance(bar, description, total, unit, done)
