"""Images of any channels as pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.utils.pictures import image_grid, pil_image, to_rgb


def every_color_and_alpha():
    """Return all pairs of 256 values and 256 alphas, uint8 [1,4,256,256]."""
    value, alpha = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    return torch.stack([value, 255 - value, value // 2, alpha])[None].to(torch.uint8)


def test_alpha_is_composited_on_white_as_pillow_does():
    pixels = every_color_and_alpha()
    white = Image.new("RGBA", (256, 256), "white")
    expected = np.asarray(Image.alpha_composite(white, pil_image(pixels[0])).convert("RGB"))
    np.testing.assert_array_equal(to_rgb(pixels)[0].permute(1, 2, 0).numpy(), expected)


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
