"""The numbers of a run in one CSV file."""

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
    """`directory`/metrics.csv: a row for each amount of images, to which a continued run adds.

    The first column is images_seen, then come the metrics; one that is new gets a column. Each row is on the disk
    when `log_metrics` returns; half a row, left by a run that was killed, is dropped. Rank 0 writes.
    Raises UserError for a file that is something else, or cannot be written.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.file = Path(directory) / "metrics.csv"
        self._rows: dict[int, dict[str, str]] = {}
        self._columns: list[str] = []
        self._read, self._whole = False, False

    @property
    def name(self) -> str:
        """Of the kind of logger."""
        return "csv"

    @property
    def version(self) -> str:
        """None: continuing a run makes no new one."""
        return ""

    @property
    def save_dir(self) -> str:
        """Where the file is."""
        return str(self.file.parent)

    def _load(self) -> None:
        """Read what an earlier part of the run wrote, once."""
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
            raise UserError(f"{self.file} is no log of a run, whose first column is {STEP}: move it away") from None

    def last_step(self, group: str) -> int:
        """The most images seen for which a metric `group`/... is logged; -1: none."""
        self._load()
        return max((s for s, row in self._rows.items() if any(k.startswith(f"{group}/") for k in row)), default=-1)

    def values(self, group: str, step: int) -> dict[str, float]:
        """The metrics `group`/... of the row of `step` images, without the group's name; empty if there are none."""
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
        """Nothing: the run's directory has its config.yaml."""
