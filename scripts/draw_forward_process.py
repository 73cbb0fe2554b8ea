"""Draw the forward processes of both stages of a relay.

python scripts/draw_forward_process.py picture=FILE.webp [key=value ...]

picture  the WebP to write
relay    a relay of two stages, which samples the clean image            (demo/emoji)
prompt   of the clean image                                              (physician, Noto style)
seed     of the clean image and of the noise                             (7)
detail   left and upper edge of the detail in the third row, in pixels   (72,88)
quality  of the WebP, 0 to 100                                           (60)

Each row goes from the clean image to the highest noise level of the stage. Noisy states are scaled to the range of
images, as in the trajectories of sample.py. The third row shows a detail of the second stage without noise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from PIL import Image
from torch import Tensor

from relay_diffusion.checkpoints.loading import load_relay
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.samplers.recording import shown_state
from relay_diffusion.utils.pictures import pil_image, save_still_webp, side_by_side, titled

FIRST_SIGMAS = (0.2, 0.5, 1.0, 3.0)  # between the clean image and the last level
LAST_SIGMAS = (0.1, 0.2, 0.4, 0.8)
SHOWN, DETAIL = 192, 48  # pixels: side of a panel, and of the part of the image that the last row enlarges
COLUMN_GAP, ROW_GAP = 12, 14  # pixels
SIGMA_SIZE, ROW_SIZE = 20, 22  # pixels, of the titles


@dataclass
class Options:
    """Options of this command; see above."""

    picture: str = MISSING
    relay: str = "demo/emoji"
    prompt: str = "physician, Noto style"
    seed: int = 7
    detail: str = "72,88"
    quality: int = 60


def corrupted(stage: DiffusionStage, clean: Tensor, sigmas: Sequence[float], noise: Tensor) -> list[Tensor]:
    """Corrupt a clean image [1,C,H,W] with one draw of noise at each level: uint8 [C,H,W]."""
    states = [shown_state(stage.corruption.corrupt(clean, sigma, noise), sigma) for sigma in sigmas]
    return [to_uint8(state[0]) for state in (clean, *states)]


def row(title: str, images: Sequence[Tensor], sigmas: Sequence[float], smooth: bool = False) -> Image.Image:
    """Arrange the clean image [C,H,W] and those of each noise level below a title."""
    names = ["clean image", *(f"sigma {sigma:.3g}" for sigma in sigmas)]
    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    panels = [pil_image(image).resize((SHOWN, SHOWN), method) for image in images]
    panels = [titled(panel, name, SIGMA_SIZE) for panel, name in zip(panels, names, strict=True)]
    return titled(side_by_side(panels, COLUMN_GAP), title, ROW_SIZE)


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Arrange rows below each other on white."""
    height = sum(part.height for part in rows) + ROW_GAP * (len(rows) - 1)
    canvas = Image.new("RGB", (max(part.width for part in rows), height), "white")
    y = 0
    for part in rows:
        canvas.paste(part, (0, y))
        y += part.height + ROW_GAP
    return canvas


@torch.inference_mode()
def run(options: Options) -> None:
    """Sample the clean image and draw the rows."""
    relay = load_relay(options.relay)
    first, last = relay.chain().values()
    block, side = last.corruption.block, last.size[0]
    edges = [int(edge) for edge in options.detail.split(",") if edge.isdigit()]
    if len(edges) != 2 or max(edges) > side - DETAIL or any(edge % block for edge in edges):
        raise UserError(
            f"detail={options.detail}: give two multiples of {block} from 0 to {side - DETAIL}, as in 72,88"
        )
    left, top = edges
    clean = relay.sample([options.seed], prompt=options.prompt).clamp(-1, 1)
    small, generator = block_mean(clean, block), PerImageGenerator([options.seed])
    first_sigmas = [*FIRST_SIGMAS, first.sampler.sigmas[0]]
    last_sigmas = [*LAST_SIGMAS, float(last.corruption.schedule.sigma(torch.tensor(1.0)))]
    noise = [stage.corruption.draw_noise(x, generator.randn_like) for stage, x in ((first, small), (last, clean))]
    blurred = [to_uint8(last.corruption.corrupt(clean, sigma, torch.zeros_like(clean))[0]) for sigma in last_sigmas]
    details = [image[:, top : top + DETAIL, left : left + DETAIL] for image in (to_uint8(clean[0]), *blurred)]
    picture = stacked(
        [
            row(
                f"First stage, {side // block}x{side // block}: noise is added until only noise is visible",
                corrupted(first, small, first_sigmas, noise[0]),
                first_sigmas,
            ),
            row(
                f"Second stage, {side}x{side}: noise is added and each {block}x{block} block fades to its mean",
                corrupted(last, clean, last_sigmas, noise[1]),
                last_sigmas,
                smooth=True,
            ),
            row(f"Second stage without its noise, a detail of {DETAIL}x{DETAIL} pixels", details, last_sigmas),
        ]
    )
    save_still_webp(picture, Path(options.picture), options.quality)
    print(f"{options.picture}: {picture.width}x{picture.height}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], __doc__ or "", Options, run))
