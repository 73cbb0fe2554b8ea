"""One relay stage as a LightningModule.

Network, corruption, loss, sampler and optimizer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from relay_diffusion.diffusion.augment import Augmentation
from relay_diffusion.diffusion.consistency import BlockConsistency
from relay_diffusion.diffusion.corruption import Corruption
from relay_diffusion.diffusion.generators import PerImageGenerator, manual_seed, mix_seeds
from relay_diffusion.diffusion.guidance import (
    Denoiser,
    Observer,
    check_guidance,
    drop_conditions,
    observed,
    with_guidance,
)
from relay_diffusion.diffusion.loss import DenoisingLoss
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.diffusion.text_states import TextStates, no_text
from relay_diffusion.diffusion.tiling import COARSEST, TiledDenoiser, Tiling
from relay_diffusion.errors import UserError
from relay_diffusion.models.finite_samples import finite, nonfinite_samples
from relay_diffusion.models.optimization import OptimizationHooks
from relay_diffusion.models.sample_arguments import (
    ClassLabels,
    Integers,
    image_batch,
    label_tensor,
    seed_list,
    text_rows,
)
from relay_diffusion.networks import (
    Condition,
    Conditioned,
    EDMPreconditioner,
    Graphed,
    GraphedTraining,
    Prompted,
    Prompts,
)
from relay_diffusion.samplers import Sampler
from relay_diffusion.utils.resolution import MAX_SIDE, Resolution, Size, image_size
from relay_diffusion.utils.signatures import check_arguments

NO_NEGATIVE = "needs classifier-free guidance; set a guidance_scale other than 1, and no guide"
CORRUPTION = {  # members that every corruption has, with the arguments of methods
    "schedule": None,
    "block": None,
    "start": ("like", "previous", "randn_like"),
    "draw_noise": ("like", "randn_like"),
    "corrupt": ("x0", "sigma", "noise"),
}
SCHEDULE = {"draw": ("size", "device"), "level": ("sigma",)}
NETWORK_INPUTS = ("x", "c_noise", "labels", "augment_labels", "condition_level", "text")

OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class StageInfo:
    """Metadata of a stage.

    config: the stage config from which a checkpoint is rebuilt. class_names: names of the classes, in order.
    origin: file and choice of weights of a loaded stage, and those of its guide. images_seen: images of its training.
    text: config and hash of the text encoder of its training, {"encoder": {"_target_": ..., ...}, "hash": ...}.
    wandb: the `run_record` of the W&B run of its training.
    """

    config: dict[str, Any] | None = None
    class_names: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    images_seen: int = 0
    text: dict[str, Any] | None = None
    wandb: dict[str, str] | None = None


def _check_members(option: str, part: Any, members: Mapping[str, Sequence[str] | None]) -> None:
    """Raise ValueError unless a part has these attributes and methods.

    members: arguments of methods by their names, None for other attributes.
    """
    missing = ", ".join(name for name in members if getattr(part, name, None) is None)
    if missing:
        raise ValueError(f"{option}={type(part).__name__}: has no {missing}; it needs {', '.join(members)}")
    for name, arguments in members.items():
        if arguments is not None:
            called = part.forward if isinstance(part, torch.nn.Module) else part  # `__call__` itself has no signature
            method = called if name == "__call__" else getattr(part, name)
            check_arguments(f"{option}={type(part).__name__}: {name}", method, arguments)


class DiffusionStage(OptimizationHooks):
    """Denoiser of a corruption with its loss, optimizer and sampler.

    `augment`: augmentation of training images; its labels are an input of the network, 0 in sampling.
    `label_dropout`: share of images that lose class and text in training, which classifier-free guidance needs.
    `guidance_scale` 1 disables guidance; other scales apply where sigma lies in `guidance_interval` (null: everywhere),
    as autoguidance if there is a `guide`, else as classifier-free guidance.
    `cuda_graphs`: on a GPU, replay the network from CUDA graphs.
    `guide`: a weaker stage with the same images and classes. `info`: metadata of the stage.
    `warmup_images`: the learning rate rises linearly over so many images. `seed` determines the training noise:
    each step derives it from (seed, position in the data), so a resumed run repeats none.
    Raises ValueError for an option out of range, or for parts that do not fit each other.
    """

    denoiser: EDMPreconditioner
    conditioned = False  # whether the network has another image as input

    def __init__(
        self,
        denoiser: EDMPreconditioner,
        corruption: Corruption,
        loss: DenoisingLoss,
        sampler: Sampler,
        optimizer: OptimizerFactory | None = None,
        augment: Augmentation | None = None,
        label_dropout: float = 0.0,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
        cuda_graphs: bool = True,
        warmup_images: int = 0,
        seed: int = 0,
        guide: DiffusionStage | None = None,
        info: StageInfo | None = None,
    ) -> None:
        info = StageInfo() if info is None else info
        super().__init__(warmup_images, info.images_seen)
        if not isinstance(denoiser, torch.nn.Module):
            raise ValueError(f"denoiser is a {type(denoiser).__name__}: must be an EDMPreconditioner")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout}: must lie between 0 and 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed}: must lie between 0 and 2^63 - 1")
        self.seed, self.info = seed, info
        self.denoiser, self.corruption, self.loss, self.sampler = denoiser, corruption, loss, sampler
        self.optimizer_factory, self.augment = optimizer, augment
        if augment is not None and augment.labels != denoiser.network.augment_labels:
            raise ValueError(
                f"network.augment_labels={denoiser.network.augment_labels}: the augmentation has {augment.labels}; "
                f"set network.augment_labels={augment.labels}"
            )
        wanted, provided = denoiser.network.condition_channels, denoiser.network.image_channels * self.conditioned
        if wanted != provided:
            raise ValueError(
                f"network.condition_channels={wanted}: {type(self).__name__} provides {provided} condition channels; "
                f"set network.condition_channels={provided}"
            )
        _check_members("corruption", corruption, CORRUPTION)
        _check_members("corruption.schedule", corruption.schedule, SCHEDULE)
        _check_members("loss", loss, {"__call__": ("denoised", "x0", "sigma")})
        _check_members("denoiser.network", denoiser.network, {"forward": NETWORK_INPUTS})
        if augment is not None:
            _check_members("augment", augment, {"__call__": ("images",)})
        evaluations = getattr(sampler, "evaluations", None)
        if not callable(sampler) or not isinstance(evaluations, int):
            raise ValueError(
                f"sampler={type(sampler).__name__}: must be callable, with the number of network evaluations as its "
                "property `evaluations`"
            )
        self._check_sampler(sampler)
        self._configured_sampler = sampler
        # constant buffers, which DistributedDataParallel would broadcast at every step
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.label_dropout, self.guidance_scale = label_dropout, guidance_scale
        check_guidance(guidance_scale, guidance_interval)
        self.guidance_interval = guidance_interval
        self.guide: EDMPreconditioner | None = None if guide is None else self._checked_guide(guide)
        self.cuda_graphs = cuda_graphs
        self._graphed: dict[int, Graphed] = {}
        self._graphed_training = GraphedTraining(denoiser)

    def _check_sampler(self, sampler: Sampler) -> None:
        """Raise ValueError unless a sampler starts where the corruption ends.

        Also for other arguments of its call.
        """
        _check_members("sampler", sampler, {"__call__": ("denoise", "start", "randn_like", "labels")})
        from_noise = [getattr(part, "starts_from_noise", None) for part in (sampler, self.corruption)]
        if None not in from_noise and from_noise[0] != from_noise[1]:
            starts = ["noise" if noise else "images" for noise in from_noise]
            raise ValueError(
                f"sampler={type(sampler).__name__}: starts from {starts[0]}, and {type(self.corruption).__name__} from "
                f"{starts[1]}; use another sampler"
            )

    def describe(self) -> dict[str, Any]:
        """Describe the settings that determine the samples, and the weights.

        Without a config, and for a sampler that was replaced since the stage was built, classes and public values
        appear in its place; without a checkpoint, a checksum of the weights. Synchronizes with the device.
        """
        parts: dict[str, Any] = {"corruption": _described(self.corruption), "sampler": _described(self.sampler)}
        if self.info.config is not None:
            parts["corruption"] = self.info.config.get("corruption")
            if self.sampler is self._configured_sampler:
                parts["sampler"] = self.info.config.get("sampler")
        return {
            **(self.info.origin or {"weights_sha256": self.weights_hash()}),
            **parts,
            "resolution": self.resolution,
            "network_evaluations": self.sampler.evaluations,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": None if self.guidance_scale == 1 else self.guidance_interval,
        }

    def weights_hash(self) -> str:
        """Return the SHA-256 of the weights, with those of a guide. Synchronizes with the device."""
        digest = hashlib.sha256()
        for denoiser in (self.denoiser, self.guide):
            for name, weight in denoiser.state_dict().items() if denoiser is not None else ():
                digest.update(name.encode())
                digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def resolution(self) -> int | list[int]:
        """Resolution of the training images, as in settings: R or [height, width]."""
        return self.denoiser.network.resolution

    @property
    def size(self) -> Size:
        """Height and width of the training images in pixels."""
        return self.denoiser.network.size

    @property
    def divisor(self) -> int:
        """Number that divides the sides of all images: of the levels and the blocks."""
        return math.lcm(self.denoiser.network.divisor, self.corruption.block)

    @property
    def image_channels(self) -> int:
        """Number of color channels."""
        return self.denoiser.network.image_channels

    @property
    def num_classes(self) -> int:
        """Number of classes of the network; 0: unconditional."""
        return self.denoiser.network.num_classes

    @property
    def text_dim(self) -> int:
        """Channels of the token states of text; 0: the network has no text."""
        return self.denoiser.network.context_dim

    @property
    def classifier_free(self) -> bool:
        """Whether sampling uses classifier-free guidance, as negative prompts need."""
        return self.guidance_scale != 1 and self.guide is None

    def tiling(self, tile: Resolution | None = None, overlap: int | None = None, batch: int = 1) -> Tiling | None:
        """Return the tiles in which this stage samples large images.

        tile: their side in pixels, or [height, width]; None: that of the training images, on which normalization and
        attention depend. overlap: None: a quarter of it. batch: tiles evaluated at once. None for a conditioned stage,
        which evaluates whole images. Raises ValueError for tiles and overlaps that do not fit the network.
        """
        step = self.divisor
        if self.conditioned:
            return None
        height, width = (max(side, COARSEST * step) for side in self.size) if tile is None else image_size(tile, "tile")
        if overlap is None:
            overlap = max(1, min(height, width) // 4 // step) * step
        return Tiling((height, width), overlap, step, batch)

    # ---- training ----

    def training_step(
        self,
        batch: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, TextStates],
        batch_idx: int,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the loss of a batch, and each image's loss and sigma.

        batch: images [B,C,H,W], uint8 or float32 in [-1, 1], RGBA with premultiplied colors; labels [B], and text of
        B rows for a network with text.
        "sigma" is on the CPU. Raises UserError if such a network gets no text.
        """
        images, labels, *texts = batch
        text = texts[0] if texts and self.text_dim else None
        if self.text_dim and text is None:
            raise UserError(
                f"network.context_dim={self.text_dim}: the training data has no text; use data with captions, or "
                "network.context_dim=0"
            )
        position = self.images_seen + self._pending + self.global_rank * len(images)
        manual_seed(mix_seeds(self.seed, position), self.device)
        x0, augment_labels = to_float(images), None
        if self.augment is not None:
            x0, augment_labels = self.augment(x0)
        sigma = self.corruption.schedule.draw(len(x0), "cpu")
        noisy = self.corruption.corrupt(x0, sigma, self.corruption.draw_noise(x0, torch.randn_like))
        labels, text = drop_conditions(labels, text, self.label_dropout)
        denoised = self.training_denoiser(noisy, sigma, labels, augment_labels, self.training_condition(x0), text)
        per_image = self.loss(denoised, x0, sigma).mean(dim=(1, 2, 3))
        self.add_pending(len(images) * self.trainer.world_size, per_image.detach())
        # as published, sum over an image's elements, which keeps gradients far above Adam's epsilon
        return {"loss": per_image.mean() * x0[0].numel(), "per_image": per_image.detach(), "sigma": sigma}

    @property
    def training_denoiser(self) -> Callable[..., Tensor]:
        """Return the denoiser that a training step calls."""
        return self._graphed_training if self.cuda_graphs else self.denoiser

    def training_condition(self, x0: Tensor) -> Condition | None:  # noqa: ARG002
        """Return the network's condition for training images x0 [B,C,H,W].

        None without conditioning.
        """
        return None

    def sampling_condition(self, previous: Tensor | None, randn_like: RandnLike) -> Condition | None:  # noqa: ARG002
        """Return the network's condition for the previous stage's images [B,C,h,w].

        None without conditioning.
        """
        return None

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer over the network's parameters.

        Raises UserError if stage.optimizer is null or rejects its options.
        """
        if self.optimizer_factory is None:
            raise UserError("stage.optimizer=null: training needs an optimizer; choose one")
        try:
            optimizer = self.optimizer_factory(self.denoiser.parameters())
        except (TypeError, ValueError) as error:
            raise UserError(f"stage.optimizer: {error} (~stage.optimizer.NAME leaves an option out)") from None
        self.prepare_optimizer(optimizer)
        return optimizer

    def on_fit_end(self) -> None:
        """Free the memory of the training graphs."""
        self._graphed_training = GraphedTraining(self.denoiser)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the stage config, classes, text encoder and counts."""
        checkpoint["stage_config"] = self.info.config
        checkpoint["class_names"] = list(self.info.class_names)
        if self.info.text is not None:
            checkpoint["text"] = self.info.text
        super().on_save_checkpoint(checkpoint)

    # ---- sampling ----

    def _checked_guide(self, weaker: DiffusionStage) -> EDMPreconditioner:
        """Return the denoiser of a guide.

        Raises UserError unless it has the same images, classes and text.
        """
        mine, theirs = (
            (stage.resolution, stage.image_channels, stage.num_classes, stage.text_dim, stage.conditioned)
            for stage in (self, weaker)
        )
        if mine != theirs:
            what = "(resolution, channels, classes, channels of text, conditioned)"
            file = weaker.info.origin.get("file")
            raise UserError(f"the guide {file} has {what} {theirs}, the stage {mine}; use another guide")
        encoders = [None if stage.text is None else stage.text["hash"] for stage in (self.info, weaker.info)]
        if None not in encoders and encoders[0] != encoders[1]:
            file = weaker.info.origin.get("file")
            raise UserError(f"the guide {file} was trained with another text encoder than the stage; use another guide")
        return weaker.denoiser

    def guided_denoiser(self, condition: Condition | None = None, prompts: Prompts | None = None) -> Denoiser:
        """Return the denoiser with this stage's guidance.

        Its labels are class labels; with prompts, indices of their images. Raises UserError if the network does not
        support the guidance.
        """
        known = self.num_classes > 0 or self.text_dim > 0
        if self.guidance_scale != 1 and self.guide is None and known and not self.label_dropout:
            raise UserError(
                f"guidance_scale={self.guidance_scale:g}: classifier-free guidance needs label dropout in training, "
                "but label_dropout=0; train with stage.label_dropout=0.1, or set guide to a weaker checkpoint; for an "
                "imported network that was trained with label dropout, set changes.label_dropout=0.1 "
                "(sample.py: +relay.stages.NAME.changes.label_dropout=0.1)"
            )
        guide = None if self.guide is None else self._evaluator(self.guide, condition, prompts)
        plain = self._evaluator(self.denoiser, condition, prompts)
        try:
            return with_guidance(plain, self.guidance_scale, self.guidance_interval, guide, known)
        except ValueError as error:
            raise UserError(str(error)) from None

    def train(self, mode: bool = True) -> DiffusionStage:
        """Set training or evaluation mode.

        Training discards the CUDA graphs, which hold cast weights.
        """
        if mode:
            self._graphed.clear()
        return super().train(mode)

    def _evaluator(
        self, denoiser: EDMPreconditioner, condition: Condition | None = None, prompts: Prompts | None = None
    ) -> Denoiser:
        evaluate: Callable[..., Tensor] = denoiser
        if condition is not None:  # graphs have no condition input
            evaluate = Conditioned(denoiser, condition)
        elif self.cuda_graphs and not self.training:  # in training a graph would occupy memory
            evaluate = self._graphed.setdefault(id(denoiser), Graphed(denoiser))
        return evaluate if prompts is None else Prompted(evaluate, prompts)

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        seeds: Integers,
        labels: ClassLabels | None = None,
        previous: Tensor | None = None,
        consistency: bool = False,
        *,
        text: TextStates | None = None,
        negative: TextStates | None = None,
    ) -> Tensor:
        """Sample images of `shape` [B,C,H,W], one per seed.

        float32 in about [-1, 1]; colors of RGBA are premultiplied. H and W: those of training, or others that `divisor`
        divides. seeds: B integers in 0..2^63-1 as a range, list, array or tensor, or one integer. labels: class indices
        or names [B], -1 or None for no class, or one for all. previous: images [B,C,H/block,W/block] of the previous
        stage, uint8 or in [-1, 1], for a stage that enlarges. Equal seeds give equal images in any batch. consistency:
        tie the block means of each estimate to `previous`. text: encoded prompts, one row per seed or one for all.
        negative: one row, the text that classifier-free guidance moves away from; None: no text. Synchronizes with the
        device. Raises ValueError if an argument does not fit, UserError for labels or text that the network does not
        have and for a negative prompt without classifier-free guidance, NonFiniteSamplesError (a UserError) if a sample
        holds nan or infinity.
        """
        seeds = seed_list(seeds)
        labels = label_tensor(labels, len(seeds), self.num_classes, self.info.class_names)
        text = text_rows("text", text, len(seeds), self.text_dim)
        negative = text_rows("negative", negative, 1, self.text_dim)
        if negative is not None and not self.classifier_free:
            raise UserError(f"negative: {NO_NEGATIVE}")
        channels, block, sides = self.image_channels, self.corruption.block, tuple(shape)[2:]
        wrong = len(shape) != 4 or tuple(shape[:2]) != (len(seeds), channels)
        if wrong or any(side < 1 or side % self.divisor for side in sides):
            raise ValueError(
                f"shape is {tuple(shape)}: must be {(len(seeds), channels, *self.size)}, an image of this stage for "
                f"each of the seeds, or of other sides divisible by {self.divisor}"
            )
        size = sides[0], sides[1]
        if previous is not None and block > 1:
            previous = image_batch("previous", previous, (len(seeds), channels, *(side // block for side in size)))
        given = seeds, size, labels, previous, self.sampler
        draw = partial(self.draw, *given, consistency=consistency, text=text, negative=negative)
        images = draw()
        fine = finite(images).tolist()
        if not all(fine):
            who = str(self.info.origin.get("file", "this stage"))
            raise nonfinite_samples(who, seeds, fine, draw)
        return images

    @torch.no_grad()
    def draw(
        self,
        seeds: Sequence[int],
        size: Size,
        labels: Tensor | None = None,
        previous: Tensor | None = None,
        sampler: Sampler | None = None,
        observers: Sequence[Observer] = (),
        consistency: bool = False,
        tiling: Tiling | None = None,
        tile_observers: Sequence[Observer] = (),
        text: TextStates | None = None,
        negative: TextStates | None = None,
    ) -> Tensor:
        """Sample like `sample`, with valid arguments and without synchronization.

        size: (height, width) of the images. Samples may be non-finite. sampler: used instead of the stage's own.
        observers: see each evaluation. tiling: tiles in which the images are evaluated; None: whole, as a conditioned
        stage needs. tile_observers: see each evaluation of tiles, or of whole images. text: a row per seed, negative:
        one row; a stage without text ignores them. Raises ValueError for a sampler that does not start where the
        corruption ends, and for consistency without `previous`.
        """
        sampler = self.sampler if sampler is None else sampler
        self._check_sampler(sampler)
        noise = PerImageGenerator(seeds, self.device, _stream(*size))
        like = torch.empty(len(seeds), self.image_channels, *size, device=self.device)
        start = self.corruption.start(like, previous, noise.randn_like)
        if labels is not None:
            labels = labels.to(self.device)
        prompts = self._prompts(len(seeds), labels, text, negative)
        if prompts is not None:
            labels = torch.arange(len(seeds), device=self.device)  # Prompted replaces them by class and text
        condition = self.sampling_condition(previous, noise.randn_like)
        denoise = observed(self.guided_denoiser(condition, prompts), tile_observers)
        if tiling is not None:
            denoise = TiledDenoiser(denoise, tiling)
        if consistency:
            if previous is None:
                raise ValueError("consistency=True: this stage starts from noise; use False")
            denoise = BlockConsistency(denoise, previous.to(like), self.corruption.block)
        denoise = observed(denoise, observers)
        training = self.training
        self.eval()
        try:
            images = sampler(denoise, start, noise.randn_like, labels)
        finally:
            self.train(training)
        if not isinstance(images, Tensor) or images.shape != like.shape:
            found = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"type {type(images).__name__}"
            raise UserError(
                f"sampler={type(sampler).__name__}: its result has {found}; it must return images of shape "
                f"{tuple(like.shape)}"
            )
        return images.float()

    def _prompts(
        self, count: int, labels: Tensor | None, text: TextStates | None, negative: TextStates | None
    ) -> Prompts | None:
        """Return the prompts of a batch on this device; None without text."""
        if not self.text_dim or (text is None and negative is None):
            return None
        text = no_text(count, self.text_dim) if text is None else text
        return Prompts(labels, text.to(self.device), None if negative is None else negative.to(self.device))


def _stream(height: int, width: int) -> int:
    """Return the random stream of images of this size.

    The stages of a relay have other sizes, so their noise is independent.
    """
    return height if height == width else height * MAX_SIDE**2 + width  # above all streams of squares and losses


def _described(part: object) -> dict[str, Any]:
    """Return the class and the public values of a sampler or corruption."""
    kind = type(part)
    described: dict[str, Any] = {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
    for name, value in getattr(part, "__dict__", {}).items():
        if name.startswith("_") or callable(value):
            continue
        plain = value is None or isinstance(value, int | float | str | list | tuple)
        described[name] = value if plain else _described(value)
    return described
