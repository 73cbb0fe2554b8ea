"""Image grids, PNG and WebP files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from relay_diffusion.utils.alpha import RGBA, straight
from relay_diffusion.utils.files import atomic_write

SHOWN_SIDE = 128  # pixels: smaller images are hard to see
TITLE_SIZE, TITLE_HEIGHT = 14, 22  # pixels


def to_rgb(images: Tensor) -> Tensor:
    """Convert grayscale, RGB or RGBA images: uint8 [B,C,H,W] -> [B,3,H,W].

    Grayscale is repeated. RGBA, with premultiplied colors, is composited on white: color + 255 - alpha. Raises
    ValueError for other channels.
    """
    channels = images.shape[1]
    if channels == RGBA:
        color, alpha = images[:, :3].int(), images[:, 3:].int()
        return (color + 255 - alpha).clamp(max=255).to(torch.uint8)
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels: must have 1 (grayscale), 3 (RGB) or 4 (RGBA)")
    return images.expand(-1, 3, -1, -1)


def pil_image(image: Tensor) -> Image.Image:
    """Convert an image, uint8 [C,H,W], to PIL: grayscale, RGB or RGBA.

    RGBA with premultiplied colors becomes straight; colors above alpha are clamped.
    """
    return Image.fromarray(straight((image[0] if len(image) == 1 else image.permute(1, 2, 0)).cpu().numpy()))


def image_grid(images: Tensor, columns: int, gap: int = 2, least_side: int = 0) -> Image.Image:
    """Arrange images, uint8 [B,C,H,W], row by row on white.

    Of 2 channels the first is shown in gray, of more than 4 the first three as RGB. Images whose sides are all below
    `least_side` are enlarged by the smallest integer factor that reaches it.
    """
    channels = images.shape[1]
    pixels = to_rgb(images[:, :1] if channels == 2 else images[:, :3] if channels > 4 else images).cpu()
    factor = max(1, -(-least_side // max(pixels.shape[2:])))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = torch.full((3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, y : y + height, x : x + width] = image
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def side_by_side(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """Arrange pictures in a row on white, aligned at the top."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width + gap
    return canvas


def titled(picture: Image.Image, title: str, size: int = TITLE_SIZE) -> Image.Image:
    """Write a title of `size` pixels above a picture, on white."""
    font, height = ImageFont.load_default(size), TITLE_HEIGHT * size // TITLE_SIZE
    width = max(picture.width, int(font.getbbox(title)[2]) + 1)
    canvas = Image.new("RGB", (width, picture.height + height), "white")
    ImageDraw.Draw(canvas).text((0, 0), title, fill="black", font=font)
    canvas.paste(picture, (0, height))
    return canvas


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def save_still_webp(picture: Image.Image, path: Path, quality: int = 80) -> None:
    """Write a WebP file of one picture atomically."""
    with atomic_write(path) as file:
        picture.save(file, format="WEBP", quality=quality, method=6)


def save_webp(frames: Sequence[Image.Image], milliseconds: Sequence[int], path: Path, quality: int = 50) -> None:
    """Write an endlessly looping WebP file atomically; `milliseconds`: duration of each frame."""
    with atomic_write(path) as file:
        frames[0].save(
            file,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=list(milliseconds),
            loop=0,
            quality=quality,
            method=4,
        )
