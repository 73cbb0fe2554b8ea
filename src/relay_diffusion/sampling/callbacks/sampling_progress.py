"""Progress of sampling, in images and parts of them, or in tiles."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from relay_diffusion.models.relay import Relay, SampleBatch, Samples
from relay_diffusion.utils.parallel import repeated
from relay_diffusion.utils.progress import Advance, progress

SECONDS = 0.1  # between two looks at finished evaluations


class SamplingProgress(Callback):
    """Show a bar of `total` images, moved by every network evaluation.

    Each evaluation of a batch counts as an equal part of its images. On a GPU it counts when it is finished, long after
    its launch: a thread queries CUDA events, so sampling waits for nothing. `done`: images sampled by earlier starts.
    `tiles`: total and done are evaluations of tiles instead, as Relay.evaluations counts them.
    Ranks count as equally fast.
    """

    def __init__(self, total: int, done: int = 0, tiles: bool = False) -> None:
        self.total, self.done, self.tiles = total, done, tiles  # of whole batches
        self._batch, self._evaluations, self._finished = 0, 1, 0  # units; all and finished evaluations of this batch
        self._launched: deque[tuple[int, torch.cuda.Event | None]] = deque()  # None: finished at once, on a CPU
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._advance: Advance | None = None
        self._device = torch.device("cpu")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar on rank 0."""
        assert isinstance(pl_module, Relay)
        if trainer.is_global_zero:
            self._device = pl_module.device
            what, unit = ("enlarging", "tiles") if self.tiles else ("sampling", "images")
            self._advance = self._stack.enter_context(progress(what, self.total, unit, self.done))
            self._stack.enter_context(repeated(self.look, SECONDS))
            pl_module.tile_observers.append(self._record_evaluation)
            self._stack.callback(pl_module.tile_observers.remove, self._record_evaluation)

    def on_predict_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: SampleBatch,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Note the number of images and evaluations."""
        assert isinstance(pl_module, Relay)
        size = None if batch.start is None else (batch.start.shape[2], batch.start.shape[3])
        with self._lock:
            self._evaluations, self._finished = pl_module.evaluations(size) * len(batch.seeds), 0
            self._batch = (self._evaluations if self.tiles else len(batch.positions)) * trainer.world_size

    def _record_evaluation(self, stage: str, x: Tensor, sigma: Tensor, estimate: Tensor) -> None:  # noqa: ARG002
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._launched.append((len(x), event))

    def look(self) -> None:
        """Move the bar by the evaluations finished since the last look."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread starts with device 0, which may belong to another rank
        with self._lock:
            before = self._finished
            while self._launched and ((event := self._launched[0][1]) is None or event.query()):
                self._finished += self._launched.popleft()[0]
            if self._finished > before:
                self._show(self._batch * min(self._finished, self._evaluations) / self._evaluations)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Samples,  # noqa: ARG002
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Move the bar to the end of the batch."""
        with self._lock:
            self._launched.clear()
            self.done, self._batch = self.done + self._batch, 0
            self._show(0)

    def _show(self, units: float) -> None:
        if self._advance is not None:
            self._advance.to(min(self.done + units, self.total))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Close the bar."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Close the bar before the message is printed."""
        self._stack.close()
