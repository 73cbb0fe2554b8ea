"""Images of any channels as pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.data.image_sets import image_tensor
from relay_diffusion.utils.pictures import image_grid, pil_image, to_rgb


def every_color_and_alpha():
    """Return all pairs of 256 values and 256 alphas as an RGBA image."""
    value, alpha = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    return Image.fromarray(np.stack([value, 255 - value, value // 2, alpha], -1).astype(np.uint8))


def composited(image):
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def test_alpha_is_composited_on_white_as_pillow_does():
    image = every_color_and_alpha()
    rgb = to_rgb(image_tensor(image)[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(rgb, composited(image))


def test_samples_are_composited_as_their_files():
    """Colors of samples can exceed alpha: files clamp them."""
    pixels = torch.randint(0, 256, (4, 64, 64), dtype=torch.uint8)
    assert (pixels[:3] > pixels[3]).any()
    np.testing.assert_array_equal(to_rgb(pixels[None])[0].permute(1, 2, 0).numpy(), composited(pil_image(pixels)))


def test_grayscale_is_repeated_and_rgb_stays():
    gray = torch.randint(0, 256, (2, 1, 3, 4), dtype=torch.uint8)
    assert torch.equal(to_rgb(gray), gray.repeat(1, 3, 1, 1))
    rgb = torch.randint(0, 256, (2, 3, 3, 4), dtype=torch.uint8)
    assert torch.equal(to_rgb(rgb), rgb)


@pytest.mark.parametrize("channels", [2, 5])
def test_other_channels_have_no_colors(channels):
    with pytest.raises(ValueError, match=f"^images of {channels} channels: must have 1"):
        to_rgb(torch.zeros(1, channels, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_image_files_have_the_channels(channels, mode):
    pixels = torch.randint(0, 256, (channels, 3, 5), dtype=torch.uint8)
    pixels[3:] = 255
    image = pil_image(pixels)
    assert (image.mode, image.size) == (mode, (5, 3))
    np.testing.assert_array_equal(np.asarray(image).reshape(3, 5, channels), pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (6, [0, 1, 2])])
def test_a_grid_shows_any_channels(channels, shown):
    images = torch.randint(0, 256, (3, channels, 2, 4), dtype=torch.uint8)
    grid = torch.from_numpy(np.array(image_grid(images, columns=2))).permute(2, 0, 1)
    assert grid.shape == (3, 2 * 2 + 2, 2 * 4 + 2)
    assert torch.equal(grid[:, 4:, :4], images[2, shown])
    assert (grid[:, 4:, 6:] == 255).all()
