"""Relay: stages in order, each starting from the previous one's images."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn

from relay_diffusion.diffusion.pixels import ROUNDING, to_float, to_uint8
from relay_diffusion.diffusion.text_states import TextStates, no_text
from relay_diffusion.diffusion.tiling import mirrored
from relay_diffusion.errors import UserError, require
from relay_diffusion.models.finite_samples import finite, nonfinite_samples
from relay_diffusion.models.sample_arguments import (
    ClassLabels,
    Integers,
    check_takes_text,
    image_batch,
    label_tensor,
    prompt_list,
    seed_list,
    text_rows,
)
from relay_diffusion.models.stage import NO_NEGATIVE, DiffusionStage
from relay_diffusion.samplers import Sampler
from relay_diffusion.text.base import TextEncoder, check_states
from relay_diffusion.utils.pictures import pil_image
from relay_diffusion.utils.resolution import MIN_SIDE, Resolution, Size, image_size, resolution_of, size_text

RelayObserver = Callable[[str, Tensor, Tensor, Tensor], None]
"""Called at each evaluation with the name of the stage and the arguments of an Observer."""


def _check_chain(stages: Mapping[str, DiffusionStage], as_trained: bool) -> None:
    """Raise UserError unless each stage fits the previous one.

    The message names both. as_trained: at the sizes of training.
    """
    require(len(stages) > 0, "relay.stages is empty: a relay needs at least a first stage")
    for before, name in itertools.pairwise(stages):
        small, large, option = stages[before], stages[name], f"relay.stages.{name}"
        block = large.corruption.block
        require(block != 1, f"{option} starts from noise, as only the first stage of a relay may: remove it or reorder")
        height, width = large.size
        needed = size_text((height // block, width // block))
        require(
            not as_trained or tuple(side * block for side in small.size) == large.size,
            f"{option} enlarges {needed} to {size_text(large.size)}, but relay.stages.{before} makes "
            f"{size_text(small.size)}; use a stage of {needed}, or relay.resolution=R or [H,W] for another size",
        )
        channels, classes = (small.image_channels, large.image_channels), (small.num_classes, large.num_classes)
        require(len({*channels}) == 1, f"{option} has {channels[1]} image channels, {before} has {channels[0]}")
        require(0 in classes or len({*classes}) == 1, f"{option} has {classes[1]} classes, {before} has {classes[0]}")
        names = small.info.class_names, large.info.class_names
        require(
            not all(names) or names[0] == names[1],
            f"{option} and {before} were trained on classes of other names or order",
        )
    with_text = {name: stage.text_dim for name, stage in stages.items() if stage.text_dim}
    for before, name in itertools.pairwise(with_text):
        require(
            with_text[before] == with_text[name],
            f"relay.stages.{name} takes text of {with_text[name]} channels, {before} of {with_text[before]}: train "
            "both with the same text encoder",
        )


def _stage_sizes(stages: Mapping[str, DiffusionStage], last: Size) -> dict[str, Size]:
    """Return the size of every stage's images.

    last: that of the last stage. Raises UserError for a size that levels or blocks do not divide.
    """
    divisor = 1
    for stage in stages.values():
        divisor = math.lcm(stage.divisor, divisor * stage.corruption.block)
    nearest = resolution_of([max(1, round(side / divisor)) * divisor for side in last])
    require(
        not any(side % divisor for side in last),
        f"relay.resolution={resolution_of(last)}: height and width must be divisible by {divisor}, because of the "
        f"levels of the networks and the blocks of the stages; use {nearest}",
    )
    sizes = {}
    for name in reversed(list(stages)):
        sizes[name], block = last, stages[name].corruption.block
        last = last[0] // block, last[1] // block
    return sizes


class Relay(L.LightningModule):
    """Chain of stages with any integer factors.

    Predicts images from (seeds, labels). A first stage that enlarges starts from given images (`start`), others from
    noise. Given images may have any size: stages evaluate large ones in tiles; `tile`, `overlap` and `tile_batch` as in
    DiffusionStage.tiling. `hand_over_sigma`: the first stage stops at that noise level and passes its estimate on.
    `rounding` to 8 bits is "nearest" or "floor"; `postprocess` changes the 8-bit images [B,C,H,W]. `consistency`:
    stages that enlarge tie the block means of their estimates to the images that they start from. `resolution`: that of
    the last stage, R or [height, width]; None: as trained. `sizes`: height and width of each stage's images, by name.
    `observers`: called at each evaluation of a network with the name of the stage and the arguments of an Observer, for
    progress and trajectories. `tile_observers`: the same for each evaluation of tiles. `encoder`: builds the text
    encoder of the stages, at the first prompt.
    Raises UserError if the output of a stage does not fit the input of the next one, the resolution or tiles do not
    divide, or consistency is set without a stage that enlarges, ValueError for another rounding or resolution.
    """

    def __init__(
        self,
        stages: Mapping[str, DiffusionStage],
        hand_over_sigma: float | None = None,
        rounding: str = "nearest",
        postprocess: Callable[[Tensor], Tensor] | None = None,
        consistency: bool = False,
        resolution: Resolution | None = None,
        tile: Resolution | None = None,
        overlap: int | None = None,
        tile_batch: int = 4,
        encoder: Callable[[], TextEncoder] | None = None,
    ) -> None:
        super().__init__()
        _check_chain(stages, as_trained=resolution is None)
        *_, last = stages.values()
        self.sizes = _stage_sizes(
            stages, last.size if resolution is None else image_size(resolution, "relay.resolution")
        )
        if rounding not in ROUNDING:
            raise ValueError(f"rounding={rounding}: use {' or '.join(ROUNDING)}")
        if consistency and all(stage.corruption.block == 1 for stage in stages.values()):
            raise UserError("relay.consistency=true: no stage of this relay enlarges images; use false")
        self._names = list(stages)  # a ModuleDict rejects some names ("keys", "pop")
        self.stages = nn.ModuleList(stages.values())
        self.rounding, self.postprocess = rounding, postprocess
        self.hand_over_sigma, self.consistency = hand_over_sigma, consistency
        self._build_encoder = encoder
        self._tiles = tile, overlap, tile_batch
        self.observers: list[RelayObserver] = []
        self.tile_observers: list[RelayObserver] = []
        try:
            self._tilings = {name: stage.tiling(tile, overlap, tile_batch) for name, stage in stages.items()}
        except ValueError as error:
            raise UserError(f"relay.{error}") from None
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

    def without_first(self, count: int = 1) -> Relay:
        """Return the relay without its first `count` stages.

        It has the same modules, options and text encoder, and enlarges given images. Raises UserError if no stage is
        left.
        """
        tile, overlap, tile_batch = self._tiles
        enlarging = Relay(
            dict(list(self.chain().items())[count:]),
            rounding=self.rounding,
            postprocess=self.postprocess,
            consistency=self.consistency,
            resolution=self.resolution,
            tile=tile,
            overlap=overlap,
            tile_batch=tile_batch,
            encoder=lambda: self.text_encoder,
        )
        return enlarging.to(self.device)

    @contextmanager
    def changed(
        self, samplers: Mapping[str, Sampler] | None = None, guidance_scales: Mapping[str, float] | None = None
    ) -> Iterator[None]:
        """Replace samplers and guidance scales of stages, by name, in this block.

        `chain()` returns the stages by name, whose corruption a sampler may need. Raises UserError for other names.
        """
        samplers, scales = samplers or {}, guidance_scales or {}
        for name in {**samplers, **scales}:
            stages = ", ".join(self._names)
            require(name in self._names, f"changed: the relay has no stage {name}; its stages are {stages}")
        before = {name: (stage.sampler, stage.guidance_scale) for name, stage in self.chain().items()}
        try:
            for name, stage in self.chain().items():
                stage.sampler = samplers.get(name, stage.sampler)
                stage.guidance_scale = scales.get(name, stage.guidance_scale)
            yield
        finally:
            for name, stage in self.chain().items():
                stage.sampler, stage.guidance_scale = before[name]

    @contextmanager
    def observed(
        self, observer: RelayObserver | None = None, tile_observer: RelayObserver | None = None
    ) -> Iterator[None]:
        """Add observers to `observers` and `tile_observers` in this block."""
        with ExitStack() as stack:
            for observers, added in ((self.observers, observer), (self.tile_observers, tile_observer)):
                if added is not None:
                    observers.append(added)
                    stack.callback(observers.remove, added)
            yield

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: unconditional."""
        return max(stage.num_classes for stage in self.chain().values())

    @property
    def text_dim(self) -> int:
        """Channels of the token states of text; 0: no stage has text."""
        return max(stage.text_dim for stage in self.chain().values())

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Text encoder of the stages, built at the first access.

        Its weights are loaded by the first prompt; `text_encoder.unload()` frees their memory. Raises UserError if the
        stages know no encoder, and if it is missing or has another width.
        """
        if self._build_encoder is None:
            raise UserError(
                "prompt: the checkpoints of this relay do not name their text encoder; encode prompts with it, and "
                "give the states to Relay.sample(text=...)"
            )
        encoder = self._build_encoder()
        if encoder.dim != self.text_dim:
            raise UserError(
                f"prompt: the text encoder gives {encoder.dim} dimensions and the relay takes {self.text_dim}; use the "
                "text encoder of its training"
            )
        return encoder

    def encode_prompts(self, prompts: Sequence[str], name: str = "prompt") -> TextStates:
        """Encode prompts on the device of the relay, each different one once.

        No encoder is needed if all are blank. name: the argument in messages. Prints which prompts are truncated.
        Raises UserError for a relay without text, and as `text_encoder`.
        """
        self.check_text(name)
        if not any(prompt.strip() for prompt in prompts):
            return no_text(len(prompts), self.text_dim, self.device)
        self.text_encoder.to(self.device)
        states = self.text_encoder.encode(prompts)
        check_states(self.text_encoder, states, len(prompts))
        return states

    def check_text(self, name: str) -> None:
        """Raise UserError if no stage has text. name: the argument in the message."""
        check_takes_text(name, self.text_dim)

    @property
    def image_channels(self) -> int:
        """Number of channels of all images."""
        return next(iter(self.chain().values())).image_channels

    @property
    def class_names(self) -> list[str]:
        """Class names of the first stage that has any; else empty."""
        return next((stage.info.class_names for stage in self.chain().values() if stage.info.class_names), [])

    @property
    def start_size(self) -> Size | None:
        """Height and width of the images that the first stage enlarges.

        None: it starts from noise.
        """
        name, first = next(iter(self.chain().items()))
        height, width = (side // first.corruption.block for side in self.sizes[name])
        return None if first.corruption.block == 1 else (height, width)

    @property
    def size(self) -> Size:
        """Height and width of the final images in pixels."""
        return self.sizes[self._names[-1]]

    @property
    def resolution(self) -> int | list[int]:
        """Resolution of the final images, as in settings: R or [height, width]."""
        return resolution_of(self.size)

    @property
    def factors(self) -> dict[str, int]:
        """Factors by which the stages enlarge the start.

        Of each stage by name, with those before it.
        """
        blocks = (stage.corruption.block for stage in self.chain().values())
        return dict(zip(self._names, itertools.accumulate(blocks, operator.mul), strict=True))

    def evaluations(self, start: Size | None = None) -> int:
        """Count the network evaluations of one image.

        start: size of an image to enlarge, whose tiles count one by one; None: the relay starts from noise.
        """
        sizes, count = self.sampled_sizes(start), 0
        for name, sampler in self.samplers.items():
            tiling = None if start is None else self._tilings[name]
            count += sampler.evaluations * (1 if tiling is None else tiling.count(sizes[name]))
        return count

    def describe_tiles(self) -> dict[str, Any]:
        """Describe the tiles of each stage, by name."""
        return {
            name: None if tiling is None else {"tile": resolution_of(tiling.size), "overlap": tiling.overlap}
            for name, tiling in self._tilings.items()
        }

    def sampled_sizes(self, start: Size | None) -> dict[str, Size]:
        """Return the size at which each stage samples.

        start: size of the images to enlarge. At least that of training, or of a smaller tile, and such that levels and
        blocks divide it. Each stage pads its images to it and crops the result.
        """
        if start is None or start == self.start_size:
            return self.sizes
        sizes = {}
        for (name, factor), stage in zip(self.factors.items(), self.chain().values(), strict=True):
            tiling = self._tilings[name]
            smallest = stage.size if tiling is None else tiling.tile(stage.size)
            height, width = (
                -(-max(side * factor, least) // stage.divisor) * stage.divisor
                for side, least in zip(start, smallest, strict=True)
            )
            sizes[name] = height, width
        return sizes

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the images.

        Settings of each stage, hand-over and conversion to 8 bits.
        """
        samplers = self.samplers
        stages = {
            name: stage.describe()
            | {"resolution": resolution_of(self.sizes[name]), "network_evaluations": samplers[name].evaluations}
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
        self,
        seeds: Integers,
        labels: ClassLabels | None = None,
        start: Tensor | None = None,
        *,
        text: TextStates | None = None,
        negative: TextStates | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> dict[str, Tensor]:
        """Sample the images [B,C,H,W] of every stage, by name.

        In about [-1, 1], RGBA with premultiplied colors; arguments and errors as in `sample`.
        """
        seeds = seed_list(seeds)
        labels = label_tensor(labels, len(seeds), self.num_classes, self.class_names)
        if negative is not None or negative_prompt is not None:
            self.check_negative("negative" if negative_prompt is None else "negative_prompt")
        text = self._text_rows("text", text, "prompt", prompt, len(seeds))
        negative = self._text_rows("negative", negative, "negative_prompt", negative_prompt, 1)
        size, channels = self.start_size, self.image_channels
        if (start is None) != (size is None):
            wanted = (
                "starts from noise: remove it" if size is None else f"enlarges images of {size_text(size)}: give them"
            )
            raise ValueError(f"start: the first stage of this relay {wanted}")
        if start is not None and size is not None:
            if isinstance(start, Tensor) and start.ndim == 4 and tuple(start.shape[2:]) != size:
                size = start.shape[2], start.shape[3]
                if min(size) < MIN_SIDE:
                    raise ValueError(
                        f"start has images of {size_text(size)}: must be at least {MIN_SIDE}x{MIN_SIDE}; pad them, or "
                        "leave them out"
                    )
            start = image_batch("start", start, (len(seeds), channels, *size))
        images, fine, check = self._draw(seeds, labels, start, text, negative)
        check(fine)
        return images

    def _text_rows(
        self, name: str, text: TextStates | None, prompt_name: str, prompt: str | Sequence[str] | None, count: int
    ) -> TextStates | None:
        """Return one row of text for each image."""
        if prompt is not None:
            if text is not None:
                raise ValueError(f"{name} and {prompt_name} were given: remove one of them")
            text = self.encode_prompts(prompt_list(prompt_name, prompt, count), prompt_name)
        return text_rows(name, text, count, self.text_dim)

    def check_negative(self, name: str) -> None:
        """Raise UserError unless classifier-free guidance uses negative text. name: the argument in the message."""
        self.check_text(name)
        if not any(stage.text_dim and stage.classifier_free for stage in self.chain().values()):
            raise UserError(f"{name}: {NO_NEGATIVE}")

    def sample(
        self,
        seeds: Integers,
        labels: ClassLabels | None = None,
        start: Tensor | None = None,
        *,
        text: TextStates | None = None,
        negative: TextStates | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> Tensor:
        """Sample final images [B,C,H,W] in about [-1, 1], one per seed.

        seeds: integers in 0..2^63-1 as a range, list, array or tensor [B], or one integer. labels: class indices
        or names [B], -1 or None for no class, or one for all; unconditional stages ignore them.
        start: images [B,C,h,w], uint8 or in [-1, 1], for a relay whose first stage enlarges. They may have any size of
        at least 8x8: small ones are continued by mirroring, large ones evaluated in tiles.
        Colors of RGBA are premultiplied, those of `start` too; `data.image_sets.image_tensor` converts a PIL image to a
        start, and `to_pil` converts samples to PIL images with straight colors.
        text: encoded prompts, one row per seed or one for all; stages without text ignore them. negative: one row, the
        text that classifier-free guidance moves away from; None: no text. prompt: text to encode instead of `text`, one
        per seed or one for all. negative_prompt: one text to encode instead of `negative`.
        Synchronizes with the device. Raises ValueError if an argument does not fit, UserError for classes or text that
        no stage has and for a negative prompt without classifier-free guidance, NonFiniteSamplesError (a UserError) if
        a stage's samples hold nan or infinity.
        """
        stages = self.sample_stages(
            seeds, labels, start, text=text, negative=negative, prompt=prompt, negative_prompt=negative_prompt
        )
        return list(stages.values())[-1]

    def _draw(
        self,
        seeds: Sequence[int],
        labels: Tensor | None,
        start: Tensor | None,
        text: TextStates | None = None,
        negative: TextStates | None = None,
    ) -> tuple[dict[str, Tensor], Tensor, Callable[[Tensor], None]]:
        """Sample the images of all stages without synchronization.

        Returns the images by stage, their finiteness (bool [stages,B]), and a function that raises
        NonFiniteSamplesError for that finiteness.
        """
        images: dict[str, Tensor] = {}
        draws, fine, previous, samplers = [], [], start, self.samplers
        given = None if start is None else (start.shape[2], start.shape[3])
        sizes, factors = self.sampled_sizes(given), self.factors
        for name, stage in self.chain().items():
            known, tiling = labels if stage.num_classes else None, None
            if start is not None and previous is not None:
                tiling, block = self._tilings[name], stage.corruption.block
                previous = mirrored(previous, (sizes[name][0] // block, sizes[name][1] // block))
            draw = partial(stage.draw, seeds, sizes[name], known, previous, samplers[name], tiling=tiling)
            consistency = self.consistency and previous is not None
            draws.append(partial(draw, consistency=consistency, text=text, negative=negative))
            images[name] = draws[-1](
                [partial(observe, name) for observe in self.observers],
                tile_observers=[partial(observe, name) for observe in self.tile_observers],
            )
            fine.append(finite(images[name]))  # clamping would hide an infinity
            if given is not None:
                images[name] = images[name][:, :, : given[0] * factors[name], : given[1] * factors[name]]
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

        These are the images that are evaluated and, after `to_pil`, written: colors of RGBA are premultiplied.
        """
        pixels = to_uint8(images, self.rounding)
        return pixels if self.postprocess is None else self.postprocess(pixels)

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """Convert images [B,C,H,W] of `sample` or `finish` to PIL images: grayscale, RGB or RGBA.

        RGBA has straight colors, and black where alpha is 0.
        """
        pixels = images if images.dtype == torch.uint8 else self.finish(images)
        return [pil_image(image) for image in pixels]

    def predict_step(self, batch: SampleBatch, batch_idx: int) -> Samples:  # noqa: ARG002
        """Sample a SampleBatch; return Samples of its wanted positions.

        The final images are on the CPU. Raises NonFiniteSamplesError before any image of the batch is written.
        """
        labels = batch.labels if self.num_classes else None
        start = None if batch.start is None else to_float(batch.start)
        stages = {} if start is None else {"start": start}
        seeds = batch.seeds.tolist()
        images, fine, check = self._draw(seeds, labels, start, batch.text, batch.negative)
        stages |= images
        wanted = {name: images[: len(batch.positions)] for name, images in stages.items()}
        # in the order of image files, whose writers would otherwise rearrange every image
        pixels = self.finish(list(wanted.values())[-1]).contiguous(memory_format=torch.channels_last)
        pixels = pixels.to("cpu", non_blocking=True)  # to pinned memory, too fast to be worth overlapping
        check(fine)  # the only synchronization, which waits for `pixels` as well
        return Samples(batch.positions, pixels, wanted)


class Samples(NamedTuple):
    """Samples of one batch.

    Colors of RGBA are premultiplied.
    positions [B]: indices in the list of all images. images: uint8 [B,C,H,W], final. stages: the images of every
    stage by name, float [B,C,H,W] in about [-1, 1], after the "start" if one was given.
    """

    positions: Tensor
    images: Tensor
    stages: dict[str, Tensor]


class SampleBatch(NamedTuple):
    """Seeds, labels and start images of one batch.

    positions [P] in the plan, seeds [B], labels [B] (-1: none), start: uint8 [B,C,h,w] or None, text: B rows or
    None, negative: one row or None. The first P <= B images are wanted; the others pad the batch.
    """

    positions: Tensor
    seeds: Tensor
    labels: Tensor
    start: Tensor | None
    text: TextStates | None = None
    negative: TextStates | None = None
