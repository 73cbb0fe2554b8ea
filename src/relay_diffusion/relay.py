"""A relay: stages in order, each starting from the images of the one before."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import lightning as L
import torch
from torch import Tensor, nn

from relay_diffusion.errors import UserError
from relay_diffusion.stage import DiffusionStage


def _check_chain(stages: Mapping[str, DiffusionStage]) -> None:
    """Refuse stages that do not fit each other, in words that name both."""
    if not stages:
        raise UserError("relay.stages is empty: a relay needs at least a first stage")
    names = list(stages)
    first = stages[names[0]]
    if first.corruption.block != 1:
        raise UserError(
            f"relay.stages.{names[0]} enlarges {first.corruption.block} times: "
            "the first stage of a relay must start from noise"
        )
    for before, name in itertools.pairwise(names):
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

    Raises UserError if a stage's output is not what the next one starts from.
    """

    def __init__(self, stages: Mapping[str, DiffusionStage]) -> None:
        super().__init__()
        _check_chain(stages)
        self.stages = nn.ModuleDict(dict(stages))

    def chain(self) -> dict[str, DiffusionStage]:
        """The stages by name, in order."""
        return {name: cast(DiffusionStage, stage) for name, stage in self.stages.items()}

    @property
    def num_classes(self) -> int:
        """Classes that may be asked for; 0: unconditional."""
        return max(stage.num_classes for stage in self.chain().values())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, as far as the checkpoints know them."""
        return next((stage.class_names for stage in self.chain().values() if stage.class_names), [])

    @property
    def resolution(self) -> int:
        """Pixels along one side of the final images."""
        return list(self.chain().values())[-1].resolution

    def describe(self) -> dict[str, dict[str, object]]:
        """What makes the images, stage by stage: checkpoint, settings, network evaluations, guidance."""
        return {
            name: {
                **stage.origin,
                **{part: (stage.stage_config or {}).get(part) for part in ("corruption", "sampler")},
                "resolution": stage.resolution,
                "network_evaluations": stage.sampler.evaluations,
                "guidance_scale": stage.guidance_scale,
            }
            for name, stage in self.chain().items()
        }

    @torch.no_grad()
    def sample_stages(self, seeds: Sequence[int], labels: Tensor | None = None) -> dict[str, Tensor]:
        """The images [B,C,H,W] of every stage by name, in about [-1, 1]; see `sample`."""
        if labels is not None and not self.num_classes:
            next(iter(self.chain().values())).check_labels(labels)
        images: dict[str, Tensor] = {}
        previous = None
        for name, stage in self.chain().items():
            shape = (len(seeds), stage.image_channels, stage.resolution, stage.resolution)
            known = labels if stage.num_classes else None
            images[name] = stage.sample(shape, seeds, known, previous)
            previous = images[name].clamp(-1, 1)  # the next stage was trained to start from means of real images
        return images

    def sample(self, seeds: Sequence[int], labels: Tensor | None = None) -> Tensor:
        """Final images [B,C,H,W] in about [-1, 1], one for each seed.

        labels: class indices [B], -1 or None for no class; a stage that knows no classes ignores them.
        Raises UserError for classes that no stage knows.
        """
        return list(self.sample_stages(seeds, labels).values())[-1]

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002
        """(seeds [B], labels [B], -1 for none) -> the images of every stage by name."""
        seeds, labels = batch
        return self.sample_stages(seeds.tolist(), labels if self.num_classes else None)
