"""Tables as CSV and on the screen."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as CSV, floats with nine digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return text.getvalue()


def print_table(rows: Sequence[Sequence[str]], width: int) -> None:
    """Print rows of a title and right-aligned cells of `width` characters."""
    longest = max(len(title) for title, *_ in rows)
    for title, *cells in rows:
        print(f"{title:<{longest}}" + "".join(f"{cell:>{width}}" for cell in cells))
