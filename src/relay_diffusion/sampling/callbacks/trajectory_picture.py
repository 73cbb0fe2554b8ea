"""Draw the sampling trajectory as a picture and an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from relay_diffusion.models.relay import Relay, Samples
from relay_diffusion.samplers.recording import Step, TrajectoryRecorder, joined
from relay_diffusion.utils.pictures import image_grid, save_png, save_webp, side_by_side
from relay_diffusion.utils.resolution import Size

MAX_SIDE = 256  # pixels: larger pictures would be hundreds of megabytes of noise
COLUMNS = 8  # columns of one stage in the picture
STEP, STAGE_END, END = 100, 800, 2500  # milliseconds


class TrajectoryPicture(Callback):
    """Draw the trajectories of the first `count` images of rank 0.

    Writes to `folder`, as soon as these images are finished: trajectory.png, two rows per image (noisy states above the
    estimates of the clean image), some steps of each stage; trajectory.webp, all steps, one column per image.
    """

    def __init__(self, folder: str | Path, count: int = 4) -> None:
        self.folder, self.count = Path(folder), count
        self._recorders: dict[str, TrajectoryRecorder] = {}
        self._steps: dict[str, list[Step]] = {}
        self._size = MAX_SIDE, MAX_SIDE

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Observe all stages on rank 0."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Relay)
        self._size = shown_size(pl_module.size)
        self._recorders = {name: TrajectoryRecorder(self.count, self._size) for name in pl_module.chain()}
        pl_module.observers.append(self._record)

    def _record(self, stage: str, x: Tensor, sigma: Tensor, estimate: Tensor) -> None:
        self._recorders[stage](x, sigma, estimate)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,
        outputs: Samples,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Collect the steps of the first `count` images, then draw them."""
        wanted = len(outputs.positions)
        for name, recorder in self._recorders.items():
            recorded = recorder.finish(outputs.stages[name])
            steps = [Step(sigma, x[:wanted], estimates[:wanted]) for sigma, x, estimates in recorded]
            self._steps[name] = joined(self._steps[name], steps) if name in self._steps else steps
            recorder.count -= len(steps[0].states)
        if self._recorders and all(recorder.count == 0 for recorder in self._recorders.values()):
            self._finish(pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Draw the collected images, if fewer than `count`."""
        if self._recorders:
            self._finish(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Stop observing."""
        self._stop(pl_module)

    def _finish(self, pl_module: L.LightningModule) -> None:
        self._stop(pl_module)
        stages = list(self._steps.values())
        save_png(strip(stages, self._size), self.folder / "trajectory.png")
        pictures = [frame(step, self._size) for steps in stages for step in steps]
        times = [time for steps in stages for time in [STEP] * (len(steps) - 1) + [STAGE_END]]
        save_webp(pictures, [*times[:-1], END], self.folder / "trajectory.webp")
        self._steps = {}

    def _stop(self, pl_module: L.LightningModule) -> None:
        if self._recorders:
            assert isinstance(pl_module, Relay)
            pl_module.observers.remove(self._record)
        self._recorders = {}


def shown_size(size: Size) -> Size:
    """Shrink (height, width) to at most MAX_SIDE pixels."""
    scale = min(1, MAX_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def strip(stages: Sequence[Sequence[Step]], size: Size, columns: int = COLUMNS) -> Image.Image:
    """Arrange steps from left to right, in two rows per image.

    The upper row shows the states, the lower one the estimates.
    """
    panels = []
    for steps in stages:
        chosen = evenly(steps, columns)
        rows = torch.stack([torch.stack(step[1:]) for step in chosen], 2)  # [2,B,steps,C,h,w]
        panels.append(image_grid(enlarged(rows.transpose(0, 1).flatten(0, 2), size), len(chosen)))
    return side_by_side(panels)


def frame(step: Step, size: Size) -> Image.Image:
    """Arrange one step of all images: states above estimates."""
    return image_grid(enlarged(torch.cat(step[1:]), size), len(step.states))


def evenly(steps: Sequence[Step], count: int) -> list[Step]:
    """Choose at most `count` evenly spaced steps, first and last included.

    count: at least 2.
    """
    last, count = len(steps) - 1, min(count, len(steps))
    return [steps[round(k * last / (count - 1))] for k in range(count)]


def enlarged(pictures: Tensor, size: Size) -> Tensor:
    """Enlarge pixels to blocks: uint8 [B,C,h,w] -> [B,C,*size]."""
    return F.interpolate(pictures, size, mode="nearest-exact")
