"""Write sampled images to PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from relay_diffusion.models.relay import Samples
from relay_diffusion.sampling.image_store import ImageStore
from relay_diffusion.sampling.plan import Plan
from relay_diffusion.utils.parallel import Background


class ImageWriter(BasePredictionWriter):
    """Write the missing images of a plan to an ImageStore.

    Threads write the images of a batch while the next batch is sampled. If sampling is interrupted, finished batches
    are still written. An error in a thread is raised after the next batch. missing: positions in the plan, determined
    on rank 0.
    """

    def __init__(self, store: ImageStore, plan: Plan, missing: Iterable[int]) -> None:
        super().__init__(write_interval="batch")
        self.store, self.plan, self.missing = store, plan, frozenset(missing)
        self._background: Background[tuple[int, Tensor]] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Create the folder on rank 0."""
        if trainer.is_global_zero:
            self.store.begin()
        trainer.strategy.barrier()
        self._background = Background(self._write)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        prediction: Samples,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Start to write the missing images of a batch."""
        assert self._background is not None
        images = zip(prediction.positions.tolist(), prediction.images.cpu(), strict=True)
        self._background.start((position, image) for position, image in images if position in self.missing)

    def _write(self, placed: tuple[int, Tensor]) -> None:
        position, image = placed
        self.store.write(self.plan.names[position], image, self.plan.png_text(position))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Wait until all ranks have written, before images are packed."""
        assert self._background is not None
        self._background.wait()
        self._background.close()
        trainer.strategy.barrier()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Finish the images in progress."""
        if self._background is not None:
            self._background.close()
