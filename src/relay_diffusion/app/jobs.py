"""Work in the background that can be followed and cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image
from torch import Tensor

Result = TypeVar("Result")
SECONDS = 0.2  # between two looks at a running job


class CancelledJobError(Exception):
    """The user has cancelled the job."""


@dataclass(eq=False)
class Job:
    """Progress of one job in network evaluations.

    An observer of Relay.tile_observers: a batch of B images or tiles counts B evaluations. total: of the whole job,
    0: not known yet. stage: the stage that is evaluated. preview: picture of the present state, if the job makes any.
    """

    total: int = 0
    done: int = 0
    stage: str = ""
    preview: Image.Image | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """End the job at its next evaluation."""
        self._cancelled.set()

    def __call__(self, stage: str, x: Tensor, sigma: Tensor, estimate: Tensor) -> None:  # noqa: ARG002
        """Count an evaluation. Raises CancelledJobError if the job was cancelled."""
        if estimate.is_cuda:
            estimate.ravel()[:1].cpu()  # the host would be many evaluations ahead
        if self._cancelled.is_set():
            raise CancelledJobError
        self.stage, self.done = stage, self.done + len(x)


def follow(work: Callable[[], Result], job: Job, seconds: float = SECONDS) -> Iterator[Result | None]:
    """Run `work` in a thread and yield its result at the end.

    Before, it yields None every `seconds`. Closing the iterator cancels the job and waits for its present evaluation.
    Raises the errors of `work`.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            while not wait([future], seconds).done:
                yield None
        finally:
            job.cancel()
    yield future.result()
