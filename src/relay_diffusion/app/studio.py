"""The models and limits of the app."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakSet

from relay_diffusion.app.enlarging import enlarging_part
from relay_diffusion.app.jobs import Job
from relay_diffusion.errors import require
from relay_diffusion.models.relay import Relay
from relay_diffusion.utils.resolution import size_text


@dataclass(frozen=True)
class Limits:
    """Limits of one job.

    max_images: seeds of a drawing. batch_size: images sampled at once. max_megapixels: of an enlarged image. Raises
    ValueError for a limit below 1.
    """

    max_images: int = 16
    batch_size: int = 8
    max_megapixels: float = 8.0

    def __post_init__(self) -> None:
        for name in ("max_images", "batch_size", "max_megapixels"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Studio:
    """What the page works with.

    name: of the relay. relay: draws, if it starts from noise. enlargers: relays that enlarge images, by name. lock:
    held by the job that uses the networks. jobs: those that may be running.
    """

    name: str
    relay: Relay
    enlargers: Mapping[str, Relay]
    limits: Limits = field(default_factory=Limits)
    lock: threading.Lock = field(default_factory=threading.Lock)
    jobs: WeakSet[Job] = field(default_factory=WeakSet)

    def new_job(self) -> Job:
        """Return a job that `cancel_jobs` cancels."""
        job = Job()
        self.jobs.add(job)
        return job

    def cancel_jobs(self) -> None:
        """Cancel all jobs at their next evaluation."""
        for job in list(self.jobs):
            job.cancel()

    @property
    def draws(self) -> bool:
        """Whether the relay starts from noise."""
        return self.relay.start_size is None

    @property
    def summary(self) -> str:
        """One line about the relay: sizes of its stages, classes, text."""
        sizes = " → ".join(size_text(self.relay.sizes[name]) for name in self.relay.chain())
        if self.relay.start_size is not None:
            sizes = f"enlarges {list(self.relay.factors.values())[-1]} times"
        classes = f"{self.relay.num_classes} classes" if self.relay.num_classes else ""
        return " · ".join(filter(None, (sizes, classes, "text" if self.relay.text_dim else "", str(self.relay.device))))


def build_studio(name: str, relay: Relay, others: Mapping[str, Relay], limits: Limits | None = None) -> Studio:
    """Choose the enlarging parts of a relay and of `others`.

    Raises UserError for one of `others` that cannot enlarge.
    """
    enlargers = {}
    for key, candidate in {**others, name: relay}.items():
        part = enlarging_part(candidate)
        require(part is not None or candidate is relay, f"enlarge={key}: no stage of this relay enlarges; remove it")
        if part is not None:
            enlargers[key] = part
    return Studio(name, relay, enlargers, Limits() if limits is None else limits)
