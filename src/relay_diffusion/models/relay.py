"""Relay: stages in order, each starting from the previous one's images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn

from relay_diffusion.diffusion.pixels import ROUNDING, to_float, to_uint8
from relay_diffusion.errors import UserError, require
from relay_diffusion.models.finite_samples import finite, nonfinite_samples
from relay_diffusion.models.sample_arguments import ClassLabels, Integers, image_batch, label_tensor, seed_list
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.samplers import Sampler


def _check_chain(stages: Mapping[str, DiffusionStage]) -> None:
    """Raise UserError unless each stage fits the previous one.

    The message names both.
    """
    require(len(stages) > 0, "relay.stages is empty: a relay needs at least a first stage")
    for before, name in itertools.pairwise(stages):
        small, large, option = stages[before], stages[name], f"relay.stages.{name}"
        block = large.corruption.block
        require(block != 1, f"{option} starts from noise, as only the first stage of a relay may: remove it or reorder")
        require(
            small.resolution * block == large.resolution,
            f"{option} makes {large.resolution}x{large.resolution} from images {block} times smaller, "
            f"but relay.stages.{before} makes {small.resolution}x{small.resolution}",
        )
        channels, classes = (small.image_channels, large.image_channels), (small.num_classes, large.num_classes)
        require(len({*channels}) == 1, f"{option} has {channels[1]} image channels, {before} has {channels[0]}")
        require(0 in classes or len({*classes}) == 1, f"{option} has {classes[1]} classes, {before} has {classes[0]}")
        names = small.info.class_names, large.info.class_names
        require(
            not all(names) or names[0] == names[1],
            f"{option} and {before} were trained on classes of other names or order",
        )


class Relay(L.LightningModule):
    """Chain of stages with any integer factors.

    Predicts images from (seeds, labels). A first stage that enlarges starts from given images (`start`), others from
    noise. `hand_over_sigma`: the first stage stops at that noise level and passes its estimate on. `rounding` to 8 bits
    is "nearest" or "floor"; `postprocess` changes the 8-bit images [B,C,H,W]. `observers`: called at each evaluation
    of a network with the name of the stage and the arguments of an Observer, for progress and trajectories.
    `consistency`: stages that enlarge tie the block means of their estimates to the images that they start from.
    Raises UserError if the output of a stage does not fit the input of the next one, or consistency is set without a
    stage that enlarges, ValueError for another rounding.
    """

    def __init__(
        self,
        stages: Mapping[str, DiffusionStage],
        hand_over_sigma: float | None = None,
        rounding: str = "nearest",
        postprocess: Callable[[Tensor], Tensor] | None = None,
        consistency: bool = False,
    ) -> None:
        super().__init__()
        _check_chain(stages)
        if rounding not in ROUNDING:
            raise ValueError(f"rounding={rounding}: use {' or '.join(ROUNDING)}")
        if consistency and all(stage.corruption.block == 1 for stage in stages.values()):
            raise UserError("relay.consistency=true: no stage of this relay enlarges images; use false")
        self._names = list(stages)  # a ModuleDict rejects some names ("keys", "pop")
        self.stages = nn.ModuleList(stages.values())
        self.rounding, self.postprocess = rounding, postprocess
        self.hand_over_sigma, self.consistency = hand_over_sigma, consistency
        self.observers: list[Callable[[str, Tensor, Tensor, Tensor], None]] = []
        _ = self.samplers  # raises for an impossible hand-over

    @property
    def samplers(self) -> Mapping[str, Sampler]:
        """Samplers of the stages by name, read-only.

        Set `stage.sampler` to change one. With an early hand-over, the first one stops there; raises UserError if it
        cannot.
        """
        samplers = {name: stage.sampler for name, stage in self.chain().items()}
        if self.hand_over_sigma is not None:
            name, first = next(iter(self.chain().items()))
            samplers[name] = self._stopped(name, first, self.hand_over_sigma)
        return MappingProxyType(samplers)

    @property
    def saved_evaluations(self) -> int:
        """Evaluations of the first network that the early hand-over saves."""
        name, first = next(iter(self.chain().items()))
        return first.sampler.evaluations - self.samplers[name].evaluations

    @staticmethod
    def _stopped(name: str, first: DiffusionStage, sigma: float) -> Sampler:
        if first.corruption.block != 1:
            raise UserError(f"relay.hand_over_sigma={sigma}: relay.stages.{name} does not start from noise; use null")
        if not hasattr(first.sampler, "stopping_at"):
            kind = type(first.sampler).__name__
            raise UserError(f"relay.hand_over_sigma={sigma}: the {kind} of relay.stages.{name} cannot stop early")
        try:
            return cast(Sampler, first.sampler.stopping_at(sigma))
        except ValueError as error:
            raise UserError(f"relay.hand_over_sigma={sigma}: {error}") from None

    def chain(self) -> dict[str, DiffusionStage]:
        """Stages by name, in order."""
        return {name: cast(DiffusionStage, stage) for name, stage in zip(self._names, self.stages, strict=True)}

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: unconditional."""
        return max(stage.num_classes for stage in self.chain().values())

    @property
    def class_names(self) -> list[str]:
        """Class names of the first stage that has any; else empty."""
        return next((stage.info.class_names for stage in self.chain().values() if stage.info.class_names), [])

    @property
    def start_resolution(self) -> int | None:
        """Side in pixels of the images that the first stage enlarges.

        None: it starts from noise.
        """
        first = next(iter(self.chain().values()))
        return None if first.corruption.block == 1 else first.resolution // first.corruption.block

    @property
    def resolution(self) -> int:
        """Side in pixels of the final images."""
        return list(self.chain().values())[-1].resolution

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the images.

        Settings of each stage, hand-over and conversion to 8 bits.
        """
        samplers = self.samplers
        stages = {
            name: stage.describe() | {"network_evaluations": samplers[name].evaluations}
            for name, stage in self.chain().items()
        }
        described = {
            "stages": stages,
            "hand_over_sigma": self.hand_over_sigma,
            "rounding": self.rounding,
            "postprocess": str(self.postprocess) if self.postprocess else None,
        }
        return described | ({"consistency": True} if self.consistency else {})  # older settings.json do not have it

    @torch.no_grad()
    def sample_stages(
        self, seeds: Integers, labels: ClassLabels | None = None, start: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sample the images [B,C,H,W] of every stage, by name.

        In about [-1, 1]; arguments and errors as in `sample`.
        """
        seeds = seed_list(seeds)
        labels = label_tensor(labels, len(seeds), self.num_classes, self.class_names)
        size, channels = self.start_resolution, next(iter(self.chain().values())).image_channels
        if (start is None) != (size is None):
            wanted = "starts from noise: remove it" if size is None else f"enlarges images of {size}x{size}: give them"
            raise ValueError(f"start: the first stage of this relay {wanted}")
        if start is not None and size is not None:
            start = image_batch("start", start, (len(seeds), channels, size, size))
        images, fine, check = self._draw(seeds, labels, start)
        check(fine)
        return images

    def sample(self, seeds: Integers, labels: ClassLabels | None = None, start: Tensor | None = None) -> Tensor:
        """Sample final images [B,C,H,W] in about [-1, 1], one per seed.

        seeds: integers in 0..2^63-1 as a range, list, array or tensor [B], or one integer. labels: class indices
        or names [B], -1 or None for no class, or one for all; unconditional stages ignore them.
        start: images [B,C,h,w], uint8 or in [-1, 1], for a relay whose first stage enlarges.
        Synchronizes with the device. Raises ValueError if an argument does not fit, UserError for classes that no stage
        has, NonFiniteSamplesError (a UserError) if a stage's samples hold nan or infinity.
        """
        return list(self.sample_stages(seeds, labels, start).values())[-1]

    def _draw(
        self, seeds: Sequence[int], labels: Tensor | None, start: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor, Callable[[Tensor], None]]:
        """Sample the images of all stages without synchronization.

        Returns the images by stage, their finiteness (bool [stages,B]), and a function that raises
        NonFiniteSamplesError for that finiteness.
        """
        images: dict[str, Tensor] = {}
        draws, fine, previous, samplers = [], [], start, self.samplers
        for name, stage in self.chain().items():
            known, consistency = labels if stage.num_classes else None, self.consistency and previous is not None
            draws.append(partial(stage.draw, seeds, known, previous, samplers[name], consistency=consistency))
            images[name] = draws[-1]([partial(observe, name) for observe in self.observers])
            fine.append(finite(images[name]))  # clamping would hide an infinity
            previous = images[name].clamp(-1, 1)  # the next stage was trained on means of real images

        def check(fine: Tensor) -> None:
            """Raise NonFiniteSamplesError for the first stage with non-finite samples.

            Synchronizes with the device.
            """
            for name, draw, whole in zip(images, draws, fine.tolist(), strict=True):
                if not all(whole):
                    raise nonfinite_samples(f"relay.stages.{name}", seeds, whole, draw)

        return images, torch.stack(fine), check

    def finish(self, images: Tensor) -> Tensor:
        """Convert images [B,C,H,W] in [-1, 1] to 8-bit images.

        These are the images that are written and evaluated.
        """
        pixels = to_uint8(images, self.rounding)
        return pixels if self.postprocess is None else self.postprocess(pixels)

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """Convert images [B,C,H,W] of `sample` or `finish` to PIL images."""
        pixels = images if images.dtype == torch.uint8 else self.finish(images)
        pixels = pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)
        return [Image.fromarray(image) for image in pixels.cpu().numpy()]

    def predict_step(self, batch: SampleBatch, batch_idx: int) -> Samples:  # noqa: ARG002
        """Sample a SampleBatch; return Samples of its wanted positions.

        The final images are on the CPU. Raises NonFiniteSamplesError before any image of the batch is written.
        """
        labels = batch.labels if self.num_classes else None
        start = None if batch.start is None else to_float(batch.start)
        stages = {} if start is None else {"start": start}
        seeds = batch.seeds.tolist()
        images, fine, check = self._draw(seeds, labels, start)
        stages |= images
        wanted = {name: images[: len(batch.positions)] for name, images in stages.items()}
        # in the order of image files, whose writers would otherwise rearrange every image
        pixels = self.finish(list(wanted.values())[-1]).contiguous(memory_format=torch.channels_last)
        pixels = pixels.to("cpu", non_blocking=True)  # to pinned memory, too fast to be worth overlapping
        check(fine)  # the only synchronization, which waits for `pixels` as well
        return Samples(batch.positions, pixels, wanted)


class Samples(NamedTuple):
    """Samples of one batch.

    positions [B]: indices in the list of all images. images: uint8 [B,C,H,W], final. stages: the images of every
    stage by name, float [B,C,H,W] in about [-1, 1], after the "start" if one was given.
    """

    positions: Tensor
    images: Tensor
    stages: dict[str, Tensor]


class SampleBatch(NamedTuple):
    """Seeds, labels and start images of one batch.

    positions [P] in the plan, seeds [B], labels [B] (-1: none), start: uint8 [B,C,h,w] or None.
    The first P <= B images are wanted; the others pad the batch.
    """

    positions: Tensor
    seeds: Tensor
    labels: Tensor
    start: Tensor | None
