"""One stage of a relay: network, corruption, loss, sampler and optimizer as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from relay_diffusion.diffusion import (
    Corruption,
    Denoiser,
    DenoisingLoss,
    RandnLike,
    check_guidance,
    drop_labels,
    guided,
)
from relay_diffusion.diffusion.augment import Augmentation
from relay_diffusion.diffusion.generators import PerImageGenerator, mix_seeds
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError
from relay_diffusion.models.finite_samples import finite, nonfinite_samples
from relay_diffusion.models.optimization import OptimizationHooks
from relay_diffusion.models.sample_arguments import ClassLabels, Integers, image_batch, label_tensor, seed_list
from relay_diffusion.networks import Condition, Conditioned, EDMPreconditioner, Graphed, GraphedTraining
from relay_diffusion.samplers import Sampler

OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class StageInfo:
    """Metadata of a stage.

    config: the stage config from which a checkpoint rebuilds it. class_names: names of the classes, in order.
    origin: the file and weights that a loaded stage came from, and those of its guide. images_seen: images of its
    training so far.
    """

    config: dict[str, Any] | None = None
    class_names: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    images_seen: int = 0


class DiffusionStage(OptimizationHooks):
    """Denoiser of a corruption with its loss, optimizer and sampler.

    `augment`: augments training images; its labels are an input of the network, 0 in sampling.
    `label_dropout`: share of labels hidden in training, which guidance away from the estimate without class needs.
    `guidance_scale` 1 disables guidance; any other is applied where sigma lies in `guidance_interval` (null:
    everywhere), away from the estimate without class, or from that of a weaker network if there is a `guide`.
    `cuda_graphs`: on a GPU, the network is replayed from graphs instead of launching its kernels one by one.
    `guide`: a weaker stage with the same images and classes. `info`: what is known about the stage besides its weights.
    `warmup_images`: the learning rate rises linearly over so many images. `seed` fixes the training noise:
    each step derives it from (seed, position in the data), so a resumed run repeats none.
    """

    denoiser: EDMPreconditioner
    conditioned = False  # whether another image is an input of the network

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
            raise ValueError(f"denoiser must be a network, not a {type(denoiser).__name__}")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout}: must lie between 0 and 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed}: must lie between 0 and 2^63 - 1")
        self.denoiser, self.corruption, self.loss, self.sampler = denoiser, corruption, loss, sampler
        self.optimizer_factory, self.augment = optimizer, augment
        if augment is not None and augment.labels != denoiser.network.augment_labels:
            raise ValueError(
                f"network.augment_labels={denoiser.network.augment_labels}, but the augmentation has {augment.labels}"
            )
        wanted, provided = denoiser.network.condition_channels, denoiser.network.image_channels * self.conditioned
        if wanted != provided:
            raise ValueError(
                f"network.condition_channels={wanted}: {type(self).__name__} provides {provided} condition channels; "
                f"set network.condition_channels={provided}"
            )
        from_noise = [getattr(part, "starts_from_noise", None) for part in (sampler, corruption)]
        if None not in from_noise and from_noise[0] != from_noise[1]:
            starts = ["noise" if noise else "images" for noise in from_noise]
            raise ValueError(
                f"sampler={type(sampler).__name__}: starts from {starts[0]}, and {type(corruption).__name__} from "
                f"{starts[1]}; use another sampler"
            )
        # constants, which DistributedDataParallel would broadcast at every step
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.label_dropout, self.guidance_scale = label_dropout, guidance_scale
        check_guidance(guidance_scale, guidance_interval)
        self.guidance_interval = guidance_interval
        self.guide: EDMPreconditioner | None = None if guide is None else self._checked_guide(guide)
        self.cuda_graphs = cuda_graphs
        self._graphed: dict[int, Graphed] = {}
        self._graphed_training = GraphedTraining(denoiser)
        self.seed, self.info = seed, info

    @property
    def resolution(self) -> int:
        """Pixels along one side of this stage's images."""
        return self.denoiser.network.resolution

    @property
    def image_channels(self) -> int:
        """Colour channels of this stage's images."""
        return self.denoiser.network.image_channels

    @property
    def num_classes(self) -> int:
        """Classes that the network knows; 0: unconditional."""
        return self.denoiser.network.num_classes

    # ---- training ----

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the loss of uint8 images [B,C,H,W] with labels [B], and each image's loss and sigma (CPU)."""
        images, labels = batch
        position = self.images_seen + self._pending + self.global_rank * len(images)
        torch.manual_seed(mix_seeds(self.seed, position))
        x0, augment_labels = to_float(images), None
        if self.augment is not None:
            x0, augment_labels = self.augment(x0)
        sigma = self.corruption.schedule.draw(len(x0), "cpu")
        noisy = self.corruption.corrupt(x0, sigma, self.corruption.draw_noise(x0, torch.randn_like))
        labels = drop_labels(labels, self.label_dropout)
        denoised = self.training_denoiser(noisy, sigma, labels, augment_labels, self.training_condition(x0))
        per_image = self.loss(denoised, x0, sigma).mean(dim=(1, 2, 3))
        self.add_pending(len(images) * self.trainer.world_size, per_image.detach())
        # as published, the sum over an image's elements: it keeps gradients far above Adam's epsilon
        return {"loss": per_image.mean() * x0[0].numel(), "per_image": per_image.detach(), "sigma": sigma}

    @property
    def training_denoiser(self) -> Callable[..., Tensor]:
        """The denoiser as a training step calls it."""
        return self._graphed_training if self.cuda_graphs else self.denoiser

    def training_condition(self, x0: Tensor) -> Condition | None:  # noqa: ARG002
        """Return the network's condition for training images x0 [B,C,H,W]; None here."""
        return None

    def sampling_condition(self, previous: Tensor | None, randn_like: RandnLike) -> Condition | None:  # noqa: ARG002
        """Return the condition in sampling, from images [B,C,h,w] of the previous stage; None here."""
        return None

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer over the network's parameters."""
        if self.optimizer_factory is None:
            raise UserError("stage.optimizer is null: training needs one")
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
        """Store the stage config, the class names and the counts."""
        checkpoint["stage_config"] = self.info.config
        checkpoint["class_names"] = list(self.info.class_names)
        super().on_save_checkpoint(checkpoint)

    # ---- sampling ----

    def _checked_guide(self, weaker: DiffusionStage) -> EDMPreconditioner:
        """The denoiser of a guide. Raises UserError unless it has the same images and classes."""
        mine, theirs = (
            (stage.resolution, stage.image_channels, stage.num_classes, stage.conditioned) for stage in (self, weaker)
        )
        if mine != theirs:
            what = "(resolution, channels, classes, conditioned)"
            raise UserError(f"the guide {weaker.info.origin.get('file')} has {what} {theirs}, the stage {mine}")
        return weaker.denoiser

    def guided(self, condition: Condition | None = None) -> Denoiser:
        """Return the denoiser with this stage's guidance. Raises UserError if guidance is impossible."""
        known = self.num_classes > 0
        if self.guidance_scale != 1 and self.guide is None and known and not self.label_dropout:
            raise UserError(
                f"guidance_scale={self.guidance_scale:g} needs a network that was trained without labels as well, and "
                "this one was not (label_dropout=0): train with stage.label_dropout=0.1, or give a weaker checkpoint "
                "as guide, which needs no label dropout; if it had some elsewhere, set changes.label_dropout=0.1 "
                "(sample.py: +relay.stages.NAME.changes.label_dropout=0.1)"
            )
        guide = None if self.guide is None else self._evaluator(self.guide, condition)
        plain = self._evaluator(self.denoiser, condition)
        try:
            return guided(plain, self.guidance_scale, self.guidance_interval, guide, known)
        except ValueError as error:
            raise UserError(str(error)) from None

    def train(self, mode: bool = True) -> DiffusionStage:
        """Set training or evaluation mode; training discards the graphs, which hold cast weights."""
        if mode:
            self._graphed.clear()
        return super().train(mode)

    def _evaluator(self, denoiser: EDMPreconditioner, condition: Condition | None = None) -> Denoiser:
        if condition is not None:  # a graph takes no condition
            return Conditioned(denoiser, condition)
        if not self.cuda_graphs or self.training:  # in training a graph would hold memory
            return denoiser
        return self._graphed.setdefault(id(denoiser), Graphed(denoiser))

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        seeds: Integers,
        labels: ClassLabels | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Images of `shape` [B,C,H,W] in about [-1, 1], float32, one for each seed.

        seeds: B integers of 0..2^63-1 as a range, list, array or tensor, or one integer. labels: class indices or
        names [B], -1 or None for no class, or one for all. previous: images [B,C,H/block,W/block] of the stage before,
        uint8 or in [-1, 1], for a stage that enlarges. Equal seeds give equal images, however they are batched.
        Waits for the device. Raises ValueError if an argument does not fit, UserError for labels that the network does
        not know, NonFiniteSamplesError (a UserError) if a sample holds nan or infinity.
        """
        seeds = seed_list(seeds)
        labels = label_tensor(labels, len(seeds), self.num_classes, self.info.class_names)
        channels, size, block = self.image_channels, self.resolution, self.corruption.block
        if tuple(shape) != (len(seeds), channels, size, size):
            raise ValueError(
                f"shape is {tuple(shape)}: must be {(len(seeds), channels, size, size)}, an image of this stage for "
                "each of the seeds"
            )
        if previous is not None and block > 1:
            previous = image_batch("previous", previous, (len(seeds), channels, size // block, size // block))
        images = self.draw(seeds, labels, previous)
        fine = finite(images).tolist()
        if not all(fine):
            who = str(self.info.origin.get("file", "this stage"))
            draw = partial(self.draw, seeds, labels, previous)
            raise nonfinite_samples(who, seeds, fine, self.sampler, draw)
        return images

    @torch.no_grad()
    def draw(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        previous: Tensor | None = None,
        sampler: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """As `sample`, for arguments known to fit, without waiting for the device: samples may be non-finite.

        sampler: used instead of the stage's own.
        """
        noise = PerImageGenerator(seeds, self.device, stream=self.resolution)  # so that stages have independent noise
        like = torch.empty(len(seeds), self.image_channels, self.resolution, self.resolution, device=self.device)
        start = self.corruption.start(like, previous, noise.randn_like)
        if labels is not None:
            labels = labels.to(self.device)
        denoise = self.guided(self.sampling_condition(previous, noise.randn_like))
        training = self.training
        self.eval()
        try:
            return (sampler or self.sampler)(denoise, start, noise.randn_like, labels).float()
        finally:
            self.train(training)
