"""Loggers, with one row for each number of images seen.

Only `logger=wandb` imports wandb.py, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch.loggers import Logger

from relay_diffusion.training.loggers.metrics_csv import MetricsCSV

__all__ = ["MetricsCSV", "last_step", "logged_row", "send_row"]


def last_step(loggers: Iterable[Logger], group: str) -> int:
    """Return the images seen at the last `group`/... row of a MetricsCSV.

    -1 without such a row.
    """
    return max((logger.last_step(group) for logger in loggers if isinstance(logger, MetricsCSV)), default=-1)


def logged_row(loggers: Iterable[Logger], group: str, images_seen: int) -> dict[str, float]:
    """Return the metrics `group`/... of a MetricsCSV at `images_seen`.

    Keys have no group prefix.
    """
    rows = (logger.values(group, images_seen) for logger in loggers if isinstance(logger, MetricsCSV))
    return next(filter(None, rows), {})


def send_row(loggers: Iterable[Logger], group: str, values: Mapping[str, float], images_seen: int) -> None:
    """Log values as `group`/... to all loggers.

    The CSV comes first: a resumed run skips the rows that it has.
    """
    row = {f"{group}/{key}": value for key, value in values.items()}
    for logger in sorted(loggers, key=lambda logger: not isinstance(logger, MetricsCSV)):
        logger.log_metrics(row, step=images_seen)
