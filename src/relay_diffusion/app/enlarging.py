"""Enlarge an image of any size."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from relay_diffusion.app.jobs import Job
from relay_diffusion.app.stage_settings import StageSettings, adjusted
from relay_diffusion.data.class_choice import class_indices
from relay_diffusion.data.decode import MODES, decode, header_size
from relay_diffusion.data.image_sets import image_tensor
from relay_diffusion.errors import require
from relay_diffusion.models.relay import Relay
from relay_diffusion.utils.resolution import MIN_SIDE, Size, exceeded_limits, size_text

MEGA = 1_000_000


class Enlarged(NamedTuple):
    """An image, enlarged bicubically and by the relay. evaluations: of tiles."""

    before: Image.Image
    after: Image.Image
    evaluations: int
    seconds: float


def enlarging_part(relay: Relay) -> Relay | None:
    """Return the part of a relay that enlarges given images.

    The relay itself if it starts from images, else its last stage; None: it only draws.
    """
    if relay.start_size is not None:
        return relay
    *before, last = relay.chain().values()
    return None if last.corruption.block == 1 else relay.without_first(len(before))


def read_image(data: bytes, relay: Relay, max_megapixels: float) -> Tensor:
    """Decode an image file to enlarge: uint8 [1,C,h,w], upright, in sRGB.

    max_megapixels: limit of the result. Raises UserError for a damaged file, other formats than PNG, JPEG and WebP, and
    for an image that is too small or too large.
    """
    size = header_size(data, "image")
    _check_size(size, list(relay.factors.values())[-1], max_megapixels)
    require(relay.image_channels in MODES, f"image: the relay has {relay.image_channels} channels; use sample.py")
    return image_tensor(decode(data, "image", channels=relay.image_channels, apply_profile=True).image)[None]


def _check_size(size: Size, factor: int, max_megapixels: float) -> None:
    require(
        min(size) >= MIN_SIDE, f"image is {size_text(size)}: must be at least {MIN_SIDE}x{MIN_SIDE}; use a larger one"
    )
    height, width = size[0] * factor, size[1] * factor
    megapixels, limits = height * width / MEGA, exceeded_limits((height, width))
    start = f"image is {size[1]}x{size[0]}: would become {width}x{height}"
    require(limits is None, f"{start}, but {limits}; crop or shrink it")
    require(
        megapixels <= max_megapixels,
        f"{start}, {megapixels:,.1f} megapixels, and this app makes at most {max_megapixels:g}; crop or shrink it, or "
        f"start the app with max_megapixels={math.ceil(megapixels)}",
    )


def enlarge(
    relay: Relay,
    image: Tensor,
    seed: int = 0,
    chosen_class: str | None = None,
    settings: Mapping[str, StageSettings] | None = None,
    job: Job | None = None,
) -> Enlarged:
    """Enlarge an image, uint8 [1,C,h,w]. chosen_class: name or number; None: no class.

    Raises UserError for options that the relay refuses.
    """
    job, began = Job() if job is None else job, time.perf_counter()
    labels = class_indices("-1" if chosen_class is None else chosen_class, relay.num_classes, relay.class_names)
    require(isinstance(seed, int) and 0 <= seed < 2**63, "seed: must be a whole number from 0 to 2^63 - 1")
    size = image.shape[2], image.shape[3]
    with adjusted(relay, settings or {}), relay.observed(tile_observer=job):
        evaluations = relay.evaluations(size)
        job.total = evaluations
        (after,) = relay.to_pil(relay.sample([seed], labels, start=image))
    (start,) = relay.to_pil(image)
    before = start.resize(after.size, Image.Resampling.BICUBIC)
    return Enlarged(before, after, evaluations, time.perf_counter() - began)
