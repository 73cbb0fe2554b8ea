"""A relay: stages in order, each starting from the images of the one before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from relay_diffusion.batches import SampleBatch, Samples
from relay_diffusion.data.images import to_float, to_uint8
from relay_diffusion.errors import UserError
from relay_diffusion.stage import DiffusionStage


def _check_chain(stages: Mapping[str, DiffusionStage]) -> None:
    """Refuse stages that do not fit each other, in words that name both."""
    if not stages:
        raise UserError("relay.stages is empty: a relay needs at least a first stage")
    for before, name in itertools.pairwise(stages):
        small, large = stages[before], stages[name]
        block = large.corruption.block
        if block == 1:
            raise UserError(f"relay.stages.{name} starts from noise: only the first stage of a relay may")
        if small.resolution * block != large.resolution:
            raise UserError(
                f"relay.stages.{name} makes {large.resolution}x{large.resolution} from images {block} times smaller, "
                f"but relay.stages.{before} makes {small.resolution}x{small.resolution}"
            )
        if small.image_channels != large.image_channels:
            raise UserError(
                f"relay.stages.{name} has {large.image_channels} image channels, {before} has {small.image_channels}"
            )
        if small.num_classes and large.num_classes and small.num_classes != large.num_classes:
            raise UserError(f"relay.stages.{name} knows {large.num_classes} classes, {before} {small.num_classes}")
        if small.class_names and large.class_names and small.class_names != large.class_names:
            raise UserError(f"relay.stages.{name} and {before} were trained on classes of other names or order")


class Relay(L.LightningModule):
    """Chains any number of stages, of any integer factors; predicts images from (seeds, labels).

    A first stage that enlarges starts from images that are given (`start`), others from noise.
    `hand_over_sigma`: the first stage stops at that noise level and hands over its estimate. `rounding` to 8 bits
    is "nearest" or "floor"; `postprocess` changes the 8-bit images [B,C,H,W].
    Raises UserError if a stage's output is not what the next one starts from.
    """

    def __init__(
        self,
        stages: Mapping[str, DiffusionStage],
        hand_over_sigma: float | None = None,
        rounding: str = "nearest",
        postprocess: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        _check_chain(stages)
        self._names = list(stages)  # a ModuleDict would refuse some that users may give ("keys", "pop")
        self.stages = nn.ModuleList(stages.values())
        self.rounding, self.postprocess = rounding, postprocess
        self.hand_over_sigma, self.saved_evaluations = hand_over_sigma, 0
        if hand_over_sigma is not None:
            self._stop_first_stage(hand_over_sigma)

    def _stop_first_stage(self, sigma: float) -> None:
        name, first = next(iter(self.chain().items()))
        if first.corruption.block != 1:
            raise UserError(f"relay.hand_over_sigma={sigma}: relay.stages.{name} does not start from noise")
        if not hasattr(first.sampler, "stopping_at"):
            kind = type(first.sampler).__name__
            raise UserError(f"relay.hand_over_sigma={sigma}: the {kind} of relay.stages.{name} cannot stop early")
        try:
            stopped = first.sampler.stopping_at(sigma)
        except ValueError as error:
            raise UserError(f"relay.hand_over_sigma={sigma}: {error}") from None
        self.saved_evaluations = first.sampler.evaluations - stopped.evaluations
        first.sampler = stopped

    def chain(self) -> dict[str, DiffusionStage]:
        """The stages by name, in order."""
        return {name: cast(DiffusionStage, stage) for name, stage in zip(self._names, self.stages, strict=True)}

    @property
    def num_classes(self) -> int:
        """Classes that may be asked for; 0: unconditional."""
        return max(stage.num_classes for stage in self.chain().values())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, as far as the checkpoints know them."""
        return next((stage.class_names for stage in self.chain().values() if stage.class_names), [])

    @property
    def start_resolution(self) -> int | None:
        """Pixels along one side of the images that the first stage enlarges; None: it starts from noise."""
        first = next(iter(self.chain().values()))
        return None if first.corruption.block == 1 else first.resolution // first.corruption.block

    @property
    def resolution(self) -> int:
        """Pixels along one side of the final images."""
        return list(self.chain().values())[-1].resolution

    def describe(self) -> dict[str, Any]:
        """What makes the images: how they are finished, and by stage its checkpoint, settings and evaluations."""
        stages = {
            name: {
                **stage.origin,
                **{part: (stage.stage_config or {}).get(part) for part in ("corruption", "sampler")},
                "resolution": stage.resolution,
                "network_evaluations": stage.sampler.evaluations,
                "guidance_scale": stage.guidance_scale,
                "guidance_interval": stage.guidance_interval,
            }
            for name, stage in self.chain().items()
        }
        return {
            "stages": stages,
            "hand_over_sigma": self.hand_over_sigma,
            "rounding": self.rounding,
            "postprocess": str(self.postprocess) if self.postprocess else None,
        }

    @torch.no_grad()
    def sample_stages(
        self, seeds: Sequence[int], labels: Tensor | None = None, start: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The images [B,C,H,W] of every stage by name, in about [-1, 1]; see `sample`."""
        if labels is not None and not self.num_classes:
            next(iter(self.chain().values())).check_labels(labels)
        images: dict[str, Tensor] = {}
        previous = start
        for name, stage in self.chain().items():
            shape = (len(seeds), stage.image_channels, stage.resolution, stage.resolution)
            known = labels if stage.num_classes else None
            images[name] = stage.sample(shape, seeds, known, previous)
            previous = images[name].clamp(-1, 1)  # the next stage was trained to start from means of real images
        return images

    def sample(self, seeds: Sequence[int], labels: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Final images [B,C,H,W] in about [-1, 1], one for each seed.

        labels: class indices [B], -1 or None for no class; a stage that knows no classes ignores them.
        start: images [B,C,h,w] in [-1, 1] for a relay whose first stage enlarges.
        Raises UserError for classes that no stage knows.
        """
        return list(self.sample_stages(seeds, labels, start).values())[-1]

    def finish(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [-1, 1] as the 8-bit images that are written and measured."""
        pixels = to_uint8(images, self.rounding)
        return pixels if self.postprocess is None else self.postprocess(pixels)

    def predict_step(self, batch: SampleBatch, batch_idx: int) -> Samples:  # noqa: ARG002
        """A SampleBatch -> Samples of the positions that it wants."""
        labels = batch.labels if self.num_classes else None
        start = None if batch.start is None else to_float(batch.start)
        stages = {} if start is None else {"start": start}
        stages |= self.sample_stages(batch.seeds.tolist(), labels, start)
        wanted = {name: images[: len(batch.positions)] for name, images in stages.items()}
        return Samples(batch.positions, self.finish(list(wanted.values())[-1]), wanted)
