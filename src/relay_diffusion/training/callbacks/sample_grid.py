"""Draw samples of the stage during training."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
from PIL import Image

from relay_diffusion.data.datamodule import evenly_spaced_captions
from relay_diffusion.data.dataset import ImageDataset, evenly_spaced_images
from relay_diffusion.diffusion.corruption import block_mean, upsample_blocks
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.models.finite_samples import NonFiniteSamplesError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.periodic import PeriodicCallback, exclude_from_throughput
from relay_diffusion.training.text import text_of_images
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.pictures import SHOWN_SIDE, image_grid, save_png, side_by_side, titled


class SampleGrid(PeriodicCallback):
    """Draw samples of fixed seeds and the EMA weights during training.

    Every `every_n_images` and at the end. Written to `directory`/images-<images seen>.png and sent to loggers with
    `log_image`, as samples/base or samples/relay; an existing picture is not drawn again. Samples that are not finite
    are reported instead. A relay stage starts from block means of `count` training images: start, sample and real image
    are side by side, with titles. A first stage samples the classes of these images. With text, each image has one of
    its captions, the same in all pictures; `directory`/prompts.txt lists them, row by row. Small images are shown
    enlarged.
    """

    def __init__(self, directory: str, every_n_images: int, count: int = 16) -> None:
        super().__init__(every_n_images)
        if not count >= 1:
            raise ValueError(f"count={count}: must be at least 1")
        self.directory, self.count = Path(directory), count

    def act(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        """Draw on rank 0, unless the picture exists."""
        path = self.directory / f"images-{stage.images_seen:09d}.png"
        if not trainer.is_global_zero or path.exists():
            return
        dataset: ImageDataset = trainer.datamodule.dataset  # type: ignore[attr-defined]
        count = min(self.count, len(dataset.names))
        text = text_of_images(trainer, stage, dataset, range(count), count)
        try:
            precision = trainer.precision_plugin.predict_step_context()
            with exclude_from_throughput(stage), stage.averaged(), precision:
                picture = self.picture(stage, dataset, text)
        except NonFiniteSamplesError as error:  # StopIfDiverged decides whether training ends
            print(f"warning: no {path.name}, {error}", file=sys.stderr, flush=True)
            return
        save_png(picture, path)
        if text is not None:
            lines = [" ".join(prompt.split()) for prompt in evenly_spaced_captions(dataset, range(count), count)]
            write_text(self.directory / "prompts.txt", "\n".join(lines) + "\n")
        name = "samples/base" if stage.corruption.block == 1 else "samples/relay"
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(name, [picture], step=stage.images_seen)

    def picture(self, stage: DiffusionStage, dataset: ImageDataset, text: TextStates | None = None) -> Image.Image:
        """Draw samples; for a relay stage between their start and real images.

        text: of the images, a row for each.
        """
        count = min(self.count, len(dataset.names))
        images, classes = evenly_spaced_images(dataset, range(count), count)
        real = to_float(images).to(stage.device)
        labels = classes if stage.num_classes else None
        columns = max(1, round(count**0.5))
        seeds = range(count)
        if stage.corruption.block == 1:
            return image_grid(
                to_uint8(stage.sample(real.shape, seeds, labels, text=text)), columns, least_side=SHOWN_SIDE
            )
        small = block_mean(real, stage.corruption.block)
        made = stage.sample(real.shape, seeds, labels, previous=small, text=text)
        shown = {"start": upsample_blocks(small, stage.corruption.block), "samples": made, "real": real}
        return side_by_side(
            [
                titled(image_grid(to_uint8(images), columns, least_side=SHOWN_SIDE), title)
                for title, images in shown.items()
            ]
        )
