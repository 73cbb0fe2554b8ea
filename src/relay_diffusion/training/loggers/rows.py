"""One row for each amount of images, also when a run is continued from a checkpoint behind its last row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch.loggers import Logger

from relay_diffusion.training.loggers.metrics_csv import MetricsCSV


def last_step(loggers: Iterable[Logger], group: str) -> int:
    """The most images seen for which a metric `group`/... was logged, as far as a MetricsCSV tells; -1: none."""
    return max((logger.last_step(group) for logger in loggers if isinstance(logger, MetricsCSV)), default=-1)


def logged_row(loggers: Iterable[Logger], group: str, images_seen: int) -> dict[str, float]:
    """The metrics `group`/... that a MetricsCSV has for an amount of images, without the group's name."""
    rows = (logger.values(group, images_seen) for logger in loggers if isinstance(logger, MetricsCSV))
    return next(filter(None, rows), {})


def send_row(loggers: Iterable[Logger], group: str, values: Mapping[str, float], images_seen: int) -> None:
    """Log values as `group`/... everywhere: first to the CSV, whose rows say what is not to be logged again."""
    row = {f"{group}/{key}": value for key, value in values.items()}
    for logger in sorted(loggers, key=lambda logger: not isinstance(logger, MetricsCSV)):
        logger.log_metrics(row, step=images_seen)
