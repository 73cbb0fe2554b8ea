"""Relay as a pipeline of the library diffusers, which this module imports.

The pipeline.py of a published folder imports it; see diffusers_layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from PIL import Image
from torch import Tensor

from relay_diffusion.checkpoints.diffusers_layout import write_diffusers_files
from relay_diffusion.checkpoints.export import RELAY_FILE, export_relay
from relay_diffusion.checkpoints.loading import load_relay, stored_sampler, with_steps
from relay_diffusion.data.decode import MODES, with_channels
from relay_diffusion.data.image_sets import image_tensor
from relay_diffusion.diffusion.guidance import check_guidance
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError, require
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.sample_arguments import MAX_SEED, ClassLabels, Integers, seed_list
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.samplers import Sampler
from relay_diffusion.utils.alpha import RGBA, premultiplied, straight
from relay_diffusion.utils.messages import did_you_mean, shorten
from relay_diffusion.utils.pictures import pil_image
from relay_diffusion.utils.resolution import size_text

Images = Image.Image | Tensor | np.ndarray | Sequence[Image.Image | Tensor | np.ndarray]
"""One image or several: PIL, tensors [C,h,w] or [B,C,h,w], arrays [h,w,C] or [B,h,w,C]; uint8, or floats in [0, 1].

RGBA has straight colors.
"""

StepCallback = Callable[["RelayPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
"""Called with the pipeline, the number of the step, sigma, and the wanted tensors with the name of the stage."""

OUTPUTS: Mapping[str, Callable[[Tensor], Any]] = {
    "pil": lambda pixels: [pil_image(image) for image in pixels],
    "pt": lambda pixels: _with_colors(straight, pixels) / 255,
    "np": lambda pixels: (_with_colors(straight, pixels).permute(0, 2, 3, 1) / 255).cpu().numpy(),
}
"""Conversions of final images, uint8 [B,C,H,W], by output_type; RGBA gets straight colors."""


class RelayLoader(ModelMixin):
    """Class that model_index.json names; it loads a Relay."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = False,  # noqa: ARG003 (changes no result)
        **options: object,
    ) -> Relay:
        """Load the relay of a published folder.

        options: others of DiffusionPipeline.from_pretrained, which gives all of them. Raises UserError for those that
        are set.
        """
        _check_dtype(torch_dtype)
        require(use_safetensors is not False, "use_safetensors=False: a relay has no other weights; remove it")
        for name, value in options.items():
            require(value is None or value is False, f"{name}={shorten(value)}: relays do not support it; remove it")
        root = Path(folder)
        if not (root / RELAY_FILE).exists() and (root.parent / RELAY_FILE).exists():
            root = root.parent  # diffusers gives the folder of a stage that has the name of the component
        require(
            (root / RELAY_FILE).exists(),
            f"{root} has no {RELAY_FILE}: diffusers does not download it from the Hub; give the folder that "
            'huggingface_hub.snapshot_download("USER/NAME") returns',
        )
        return load_relay(root)


class RelayPipeline(DiffusionPipeline):
    """Pipeline that samples from a relay or enlarges images.

    `relay`: the relay, e.g. of load_relay(FOLDER, changes=..., text_path=...).
    """

    _callback_tensor_inputs = ("latents", "estimates")

    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self.register_modules(relay=relay)

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,  # noqa: ARG002 (there are none)
    ) -> RelayPipeline:
        """Move the relay to a device. Raises UserError for another dtype than float32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        _check_dtype(dtype)
        self.relay.to(self.relay.device if device is None else torch.device(device))
        return self

    def set_attention_slice(self, slice_size: object) -> None:
        """Raise UserError, because relays have no sliced attention."""
        raise UserError(f"slice_size={shorten(slice_size)}: relays have no sliced attention; remove the call")

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: object = None) -> None:  # noqa: ARG002
        """Raise UserError, because relays use the attention of torch."""
        raise UserError("xformers: relays use the attention of torch; remove the call")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
    ) -> None:
        """Write the folder that `from_pretrained` loads, without a model card.

        Raises UserError for options that relays do not support, and for settings that relay.json cannot hold.
        """
        require(safe_serialization, "safe_serialization=False: relays are written as safetensors; remove it")
        for name, value in (("variant", variant), ("max_shard_size", max_shard_size), ("use_flashpack", use_flashpack)):
            require(not value, f"{name}={shorten(value)}: relays do not support it; remove it")
        require(not push_to_hub, "push_to_hub=True: use python -m relay_diffusion.cli.publish format=diffusers")
        relay, chain = self.relay, self.relay.chain()
        lost = {
            "hand_over_sigma": relay.hand_over_sigma is not None,
            "rounding": relay.rounding != "nearest",
            "postprocess": relay.postprocess is not None,
            "resolution": any(relay.sizes[name] != stage.size for name, stage in chain.items()),
            "sampler": any(stored_sampler(stage) is None for stage in chain.values()),
            "guide": any(stage.guide is not None for stage in chain.values()),
        }
        for name in (name for name, is_lost in lost.items() if is_lost):
            raise UserError(f"save_pretrained: {RELAY_FILE} cannot hold this relay's {name}; save it without")
        folder = Path(save_directory).expanduser()
        export_relay(chain, folder, consistency=relay.consistency)
        write_diffusers_files(folder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        class_labels: ClassLabels | None = None,
        image: Images | None = None,
        num_images_per_prompt: int | None = None,
        seeds: Integers | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        num_inference_steps: int | Mapping[str, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images in one batch.

        prompt, class_labels, image: one for all, or lists of one length. class_labels: indices or names.
        image: images to enlarge; a first stage that starts from noise is skipped. num_images_per_prompt: images of each
        prompt, label and image, one after the other; None: 1, or for a single prompt as many as there are seeds.
        seeds: of each image. generator: gives its initial seed, and the next integers for further images; or a list of
        one for each image. Its state is neither used nor changed. None of both: random seeds, by torch.manual_seed.
        guidance_scale, num_inference_steps: numbers for the first stage that runs, or of stages by name; None: as
        stored. output_type: pil, pt ([B,C,H,W]) or np ([B,H,W,C]), both floats in [0, 1], of the 8-bit images; RGBA has
        straight colors in all of them. return_dict: False: return a tuple. callback_on_step_end: called after each
        evaluation of a network with (pipe, step, sigma, {"stage": name, "latents": noisy images, "estimates": clean
        images}); it cannot change tensors, and their RGBA has premultiplied colors.
        Raises ValueError (UserError) for arguments that the relay does not support, before sampling.
        """
        convert = OUTPUTS.get(output_type)
        if convert is None:
            raise UserError(f"output_type={shorten(output_type)}: use {', '.join(OUTPUTS)}")
        relay = self._relay_for(image)
        start = None if image is None else _start(image, relay.image_channels).to(relay.device)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        labels = _label_list(class_labels)
        given = {"prompt": prompts, "class_labels": labels, "image": None if start is None else range(len(start))}
        lengths = {name: len(values) for name, values in given.items() if values is not None}
        items = max([1, *lengths.values()])
        for name, length in lengths.items():
            require(length in (1, items), f"{name} holds {length} for {items} images; give as many, or one for all")
        chosen, each = _seeds(seeds, generator, items, num_images_per_prompt)
        rows = {name: _rows(values, items, each) for name, values in given.items() if values is not None}
        negative = _one_text(negative_prompt)
        with ExitStack() as stack:
            stack.enter_context(_changed_stages(relay, guidance_scale, num_inference_steps))
            size = None if start is None else (start.shape[2], start.shape[3])
            bar = stack.enter_context(self.progress_bar(total=relay.evaluations(size) * len(chosen)))
            observer = None
            if callback_on_step_end is not None:
                observer = _StepObserver(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
            stack.enter_context(relay.observed(observer, lambda _stage, x, _sigma, _estimate: bar.update(len(x))))
            images = relay.sample(
                chosen,
                rows.get("class_labels"),
                None if start is None else start[rows["image"]],
                prompt=rows.get("prompt"),
                negative_prompt=negative,
            )
        converted = convert(relay.finish(images))
        return ImagePipelineOutput(images=converted) if return_dict else (converted,)

    def _relay_for(self, image: Images | None) -> Relay:
        """Return the relay that makes images from noise, or enlarges `image`."""
        relay: Relay = self.relay
        if image is not None and relay.start_size is None:
            require(len(relay.stages) > 1, "image: this relay has no stage that enlarges; remove it")
            return relay.without_first()
        if image is None and relay.start_size is not None:
            raise UserError(f"image: this relay enlarges images of {size_text(relay.start_size)} or others; give them")
        return relay


class _StepObserver:
    """Observer of a relay that calls a callback_on_step_end."""

    def __init__(self, pipe: RelayPipeline, callback: StepCallback, names: Sequence[str]) -> None:
        known = RelayPipeline._callback_tensor_inputs
        for name in names:
            if name not in known:
                raise UserError(f"callback_on_step_end_tensor_inputs: unknown {shorten(name)}; use {', '.join(known)}")
        self.pipe, self.callback, self.names, self.step = pipe, callback, names, 0

    def __call__(self, stage: str, x: Tensor, sigma: Tensor, estimate: Tensor) -> None:
        tensors = {"latents": x, "estimates": estimate}
        given = {"stage": stage, **{name: tensors[name] for name in self.names}}
        returned = self.callback(self.pipe, self.step, float(sigma[0]), dict(given)) or {}
        for name, value in returned.items():
            if value is not given.get(name):
                raise UserError(
                    f"callback_on_step_end returns another {shorten(name)}: it cannot change a relay's steps"
                )
        self.step += 1


def _check_dtype(dtype: torch.dtype | None) -> None:
    """Raise UserError for another dtype than float32."""
    require(dtype in (None, torch.float32), f"dtype={dtype}: a relay keeps float32 weights; remove it")


def _label_list(labels: Any) -> list[Any] | None:
    """Return class labels as a list; None stays None."""
    if isinstance(labels, Tensor | np.ndarray):
        labels = labels.tolist()
    return labels if labels is None else [labels] if isinstance(labels, int | str) else list(labels)


def _one_text(text: Any) -> str | None:
    """Require one text or None."""
    if not (text is None or isinstance(text, str)):
        raise UserError(f"negative_prompt={shorten(text)}: must be one text, which is for all images")
    return text


def _rows(values: Sequence[Any], items: int, each: int) -> list[Any]:
    """Repeat values for each image: `items` of them, or one for all."""
    every = list(values) * (items // len(values))
    return [value for value in every for _ in range(each)]


def _seeds(
    seeds: Integers | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    items: int,
    each: int | None,
) -> tuple[list[int], int]:
    """Return the seed of each image, and the images of each item."""
    require(seeds is None or generator is None, "seeds and generator were given: remove one of them")
    require(
        each is None or (type(each) is int and each > 0),
        f"num_images_per_prompt={shorten(each)}: must be an integer of at least 1",
    )
    name, chosen = "seeds", None if seeds is None else seed_list(seeds)
    if generator is not None and not isinstance(generator, torch.Generator):
        many = isinstance(generator, list | tuple)
        name, chosen = "generator", [_initial_seed(one) for one in (generator if many else [generator])]
    if each is None:
        each = len(chosen) if chosen is not None and items == 1 else 1
    count = items * each
    if isinstance(generator, torch.Generator):
        chosen = [(_initial_seed(generator) + k) % (MAX_SEED + 1) for k in range(count)]
    elif chosen is None:
        chosen = torch.randint(MAX_SEED, (count,), device="cpu").tolist()
    if len(chosen) != count:
        raise UserError(f"{name} holds {len(chosen)} for {count} images: give one for each")
    return chosen, each


def _initial_seed(generator: Any) -> int:
    if not isinstance(generator, torch.Generator):
        raise UserError(
            f"generator holds a {type(generator).__name__}: must be a torch.Generator; seeds takes integers"
        )
    return generator.initial_seed() % (MAX_SEED + 1)


def _start(image: Images, channels: int) -> Tensor:
    """Convert images to enlarge to floats [B,C,h,w] in [-1, 1]."""
    parts = [_pixels(part, channels) for part in (image if isinstance(image, list | tuple) else [image])]
    sizes = sorted({(part.shape[2], part.shape[3]) for part in parts})
    require(len(sizes) > 0, "image is empty: give at least one")
    require(
        len(sizes) == 1,
        f"image holds sizes {', '.join(map(size_text, sizes[:5]))}: call the pipeline once for each",
    )
    return torch.cat(parts)


def _pixels(image: Any, channels: int) -> Tensor:
    """Convert an image or batch to floats [B,C,h,w] in [-1, 1].

    Straight colors of RGBA become premultiplied.
    """
    if isinstance(image, Image.Image):
        require(channels in MODES, f"image: this relay has {channels} channels; give tensors")
        return to_float(image_tensor(with_channels(image, channels)[0])[None])
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image.copy())  # torch warns of arrays that are read-only
        image = image.movedim(-1, -3) if image.ndim in (3, 4) else image
    if not isinstance(image, Tensor) or not (image.dtype == torch.uint8 or image.is_floating_point()):
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise UserError(f"image is {kind}: give PIL images, or tensors or arrays of uint8 or of floats in [0, 1]")
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != channels:
        raise UserError(
            f"image has shape {tuple(image.shape)}: must have {channels} channels, as [B,C,h,w] or [B,h,w,C]"
        )
    if image.dtype == torch.uint8:
        return to_float(_with_colors(premultiplied, image))
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise UserError("image has values outside [0, 1]: floats must lie in it; divide pixels by 255")
    return _with_colors(premultiplied, image.float() * 2 - 1)


def _with_colors(change: Callable[[np.ndarray], np.ndarray], images: Tensor) -> Tensor:
    """Apply a function of arrays [B,h,w,4] to RGBA images.

    Images of other channels stay.
    """
    if images.shape[1] != RGBA:
        return images
    changed = torch.from_numpy(change(images.movedim(1, -1).cpu().numpy()))
    return changed.movedim(-1, 1).to(images.device)


@contextmanager
def _changed_stages(relay: Relay, scales: Any, steps: Any) -> Iterator[None]:
    """Change guidance scales and steps of stages within this block.

    scales, steps: a number for the first stage, numbers by name, or None. Raises UserError for an unknown stage and for
    values that a stage does not support.
    """
    chain = relay.chain()
    samplers = {
        name: _sampler_of(name, chain[name], count)
        for name, count in _by_stage("num_inference_steps", steps, chain).items()
    }
    guidance = _by_stage("guidance_scale", scales, chain)
    for name, scale in guidance.items():
        check_guidance(scale, chain[name].guidance_interval)
    with relay.changed(samplers, guidance):
        yield


def _by_stage(option: str, values: Any, chain: Mapping[str, DiffusionStage]) -> dict[str, Any]:
    """Return the values of stages by name. Raises UserError for an unknown stage."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        return {next(iter(chain)): values}
    for name in values:
        require(name in chain, f"{option}: no stage {shorten(name)} runs{did_you_mean(str(name), chain)}")
    return dict(values)


def _sampler_of(name: str, stage: DiffusionStage, steps: Any) -> Sampler:
    """Return the sampler of a stage with another number of steps.

    Raises UserError for a sampler without steps, and for a number that it refuses.
    """
    option, config = f"num_inference_steps={shorten(steps)}", stored_sampler(stage)
    require(type(steps) is int, f"{option}: must be an integer")
    if config is None or "steps" not in config:
        raise UserError(f"{option}: the sampler of stage {name} has no steps that can be set; remove it")
    return with_steps(config, steps, option)
