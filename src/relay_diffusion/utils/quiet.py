"""Hide messages of other libraries that users cannot act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("lightning.pytorch", "lightning.fabric")  # INFO: advertisements and the devices of the host
MESSAGES = (
    ".*does not have many workers",  # images in memory need no workers
    ".*treespec, LeafSpec",  # Lightning uses a deprecated torch API
    r"It is recommended to use `self.log\('(train|val|eval)/",  # reduced over the ranks before they are logged
    "The AccumulateGrad node's stream",  # Lightning builds DDP on another stream; gradients are synchronized
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide these messages in the block or the decorated function.

    Other warnings are still shown.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
