"""Measure the loss on held-out images at fixed noise."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

from relay_diffusion.data.dataset import ImageDataset, evenly_spaced_images
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.periodic import PeriodicMeasurement
from relay_diffusion.training.text import text_of_images

GOLDEN = 0.6180339887498949  # golden ratio: its multiples modulo 1 are a low-discrepancy sequence
STREAM = 2**20  # random stream of the noise; sampling uses resolutions as streams


class Validation(PeriodicMeasurement):
    """Validation loss of the EMA weights, in total and by noise level.

    Logs val/loss and val/loss_noise_1 ... every `every_n_images` and at the end. `count` images, evenly spaced over
    `dataset` (all if it has fewer), are evaluated once in each of the `bins` equal parts of the noise levels, 1 the
    smallest noise. Levels and noise depend on the index of the image alone, so they are equal at every measurement, in
    every run, and for any number of devices. With text, an image has one of its captions, always the same one. Dropout,
    augmentation and label dropout are off; a cascade stage gets its condition as in sampling. Raises UserError if the
    dataset has other classes than training, or training images.
    """

    group = "val"

    def __init__(
        self, dataset: ImageDataset, every_n_images: int, count: int = 512, batch_size: int = 64, bins: int = 4
    ) -> None:
        super().__init__(every_n_images)
        for name, value in (("count", count), ("batch_size", batch_size), ("bins", bins)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value}: must be a whole number, at least 1")
        self.dataset, self.count, self.batch_size, self.bins = dataset, count, batch_size, bins

    def setup(self, trainer: L.Trainer, pl_module: DiffusionStage, stage: str) -> None:
        """Compare the dataset with that of training."""
        training = trainer.datamodule.dataset  # type: ignore[attr-defined]
        if self.dataset.class_names != training.class_names:
            raise UserError(
                f"callbacks.validation.dataset has other classes ({self.dataset.num_classes}) than data.dataset "
                f"({training.num_classes}): take both from one image set"
            )
        same = set(self.dataset.names) & set(training.names) if self.dataset.path == training.path else set()
        if same:
            raise UserError(
                f"callbacks.validation.dataset: {len(same):,} of {len(self.dataset.names):,} images are "
                "also in data.dataset; set data.dataset.subset to a folder without them, such as train"
            )

    @property
    def names(self) -> list[str]:
        """Names of the loss in total and by noise level."""
        return ["loss", *(f"loss_noise_{part + 1}" for part in range(self.bins))]

    def measure(self, trainer: L.Trainer, stage: DiffusionStage) -> dict[str, float]:
        """Denoise every image in every part of the noise levels."""
        count = min(self.count, len(self.dataset.names))
        cases = range(count * self.bins)[trainer.global_rank :: trainer.world_size]
        sums = torch.zeros(self.bins, dtype=torch.float64, device=stage.device)
        training = stage.training
        with stage.averaged(), trainer.precision_plugin.val_step_context():
            stage.eval()
            try:
                for first in range(0, len(cases), self.batch_size):
                    batch = cases[first : first + self.batch_size]
                    parts = torch.tensor([case % self.bins for case in batch], device=stage.device)
                    sums.index_add_(0, parts, self._losses(trainer, stage, batch, count).double())
            finally:
                stage.train(training)
        losses = [total / count for total in trainer.strategy.reduce(sums, reduce_op="sum").tolist()]
        return dict(zip(self.names, [sum(losses) / len(losses), *losses], strict=True))

    def _losses(self, trainer: L.Trainer, stage: DiffusionStage, cases: Sequence[int], count: int) -> Tensor:
        """Compute the loss [B] of cases.

        A case is image case // bins in part case % bins of the noise levels.
        """
        numbers = [case // self.bins for case in cases]
        images, labels = evenly_spaced_images(self.dataset, numbers, count)
        x0 = to_float(images).to(stage.device)
        within = [(case // self.bins + 0.5) * GOLDEN % 1 for case in cases]
        level = [(case % self.bins + place) / self.bins for case, place in zip(cases, within, strict=True)]
        schedule = stage.corruption.schedule
        sigma = schedule.sigma(torch.tensor(level).clamp(min=schedule.level_floor))
        noise = PerImageGenerator(cases, stage.device, stream=STREAM)
        noisy = stage.corruption.corrupt(x0, sigma, stage.corruption.draw_noise(x0, noise.randn_like))
        previous = block_mean(x0, stage.corruption.block) if stage.conditioned else None
        condition = stage.sampling_condition(previous, noise.randn_like)
        known = labels.to(stage.device) if stage.num_classes else None
        text = text_of_images(trainer, stage, self.dataset, numbers, count)
        given = None if text is None else text.to(stage.device)
        denoised = stage.denoiser(noisy, sigma, known, None, condition, given)
        return stage.loss(denoised, x0, sigma).mean(dim=(1, 2, 3))
