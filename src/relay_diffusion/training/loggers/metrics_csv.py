"""Log metrics to one CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import write_text

STEP = "images_seen"


class MetricsCSV(Logger):
    """Write `directory`/metrics.csv, one row per number of images seen.

    The first column is images_seen, the others are metrics; a new metric adds a column. A row is on disk when
    `log_metrics` returns; an incomplete row of a killed run is dropped. A resumed run appends. Rank 0 writes.
    Raises UserError for a file with other content, and for one that cannot be written.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.file = Path(directory) / "metrics.csv"
        self._rows: dict[int, dict[str, str]] = {}
        self._columns: list[str] = []
        self._read, self._whole = False, False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Return "": a resumed run has no new version."""
        return ""

    @property
    def save_dir(self) -> str:
        """Directory of the file."""
        return str(self.file.parent)

    def _load(self) -> None:
        """Read the rows of an earlier part of the run, once."""
        if self._read:
            return
        self._read = True
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        self._whole = text.endswith("\n")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        if not lines:
            return
        try:
            if lines[0][0] != STEP:
                raise ValueError
            self._columns = lines[0][1:]
            for step, *values in lines[1:]:
                self._rows[int(step)] = {k: v for k, v in zip(self._columns, values, strict=True) if v}
        except (ValueError, IndexError):
            raise UserError(f"{self.file} is not a training log (first column not {STEP}): move it away") from None

    def last_step(self, group: str) -> int:
        """Return the images seen at the last `group`/... row, or -1."""
        self._load()
        return max((s for s, row in self._rows.items() if any(k.startswith(f"{group}/") for k in row)), default=-1)

    def values(self, group: str, step: int) -> dict[str, float]:
        """Return the metrics `group`/... at `step` images, without that prefix."""
        self._load()
        row = self._rows.get(step, {})
        return {key.removeprefix(f"{group}/"): float(v) for key, v in row.items() if key.startswith(f"{group}/")}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add the metrics to the row of `step` images."""
        assert step is not None, "a row needs its images seen"
        self._load()
        new = [key for key in metrics if key not in self._columns]
        appends = self._whole and not new and step > max(self._rows, default=-1)
        self._columns += new
        self._rows.setdefault(step, {}).update({key: str(value) for key, value in metrics.items()})
        if appends:
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(self._text([step]))
            except OSError as error:
                raise UserError(f"{self.file} cannot be written: {error.strerror or error}") from None
        else:
            write_text(self.file, self._text([], header=True) + self._text(sorted(self._rows)))
            self._whole = True

    def _text(self, steps: list[int], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if header:
            writer.writerow([STEP, *self._columns])
        writer.writerows([step, *(self._rows[step].get(key, "") for key in self._columns)] for step in steps)
        return text.getvalue()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters: the run directory has config.yaml."""
