"""Progress bars on a terminal, occasional plain lines in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # a log gets one line in this many seconds
QUIET = "RELAY_DIFFUSION_QUIET"  # 1: no progress at all


class Advance:
    """Counter of finished units of work.

    `__call__(n, note)` adds n and calls `show(done, note)`.
    """

    def __init__(self, done: int, show: Callable[[int, str], None]) -> None:
        self.done, self.note, self._show = done, "", show

    def __call__(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = self.note if note is None else note
        self._show(self.done, self.note)


@contextmanager
def progress(
    description: str, total: int, unit: str = "images", done: int = 0, enabled: bool = True
) -> Iterator[Advance]:
    """Show progress towards `total` units.

    Yields an `Advance` to call with each finished count. done: units finished earlier, as in a resumed run.
    Shows nothing if disabled (ranks above 0) or with RELAY_DIFFUSION_QUIET=1.
    """
    next_line = time.monotonic()

    def print_line(done: int, note: str) -> None:
        nonlocal next_line
        if time.monotonic() >= next_line or done >= total:
            next_line = time.monotonic() + PLAIN_SECONDS
            print(f"{description}: {done:,}/{total:,} {unit}{note and '  '}{note}", flush=True)

    if not enabled or os.environ.get(QUIET) == "1":
        yield Advance(done, lambda *_: None)
    elif not sys.stdout.isatty():
        yield Advance(done, print_line)
    else:
        texts = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[unit]", "fields[note]")]
        columns = (texts[0], BarColumn(), MofNCompleteColumn(), texts[1], TimeRemainingColumn(), texts[2])
        with Progress(*columns, console=Console()) as bar:
            task = bar.add_task(description, total=total, completed=done, unit=unit, note="")
            yield Advance(done, lambda done, note: bar.update(task, completed=done, note=note))
