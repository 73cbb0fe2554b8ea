"""Compare the published postprocessing with its formulas."""

import numpy as np
import pytest
import torch

from relay_diffusion.errors import UserError
from relay_diffusion.sampling.postprocess import Enhance
from relay_diffusion.utils.alpha import premultiplied, straight

PIXELS = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def gray(pixels):
    """ITU-R 601 luma, as Pillow rounds it."""
    red, green, blue = pixels.long().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[:, None].double()


def test_factors_of_one_change_nothing():
    assert torch.equal(Enhance()(PIXELS), PIXELS)


def test_images_of_other_channels():
    gray = PIXELS[:, :1]
    assert torch.equal(Enhance(brightness=1.06)(gray), Enhance(brightness=1.06)(gray.expand(-1, 3, -1, -1))[:, :1])
    with pytest.raises(UserError, match=r"^relay\.postprocess: Enhance cannot change images of 2 channels; use null$"):
        Enhance()(PIXELS[:, :2])


def test_straight_colors_of_transparent_images_are_enhanced():
    enhance = Enhance(0.9, 1.05, 0.99)
    rgba = torch.cat([PIXELS, PIXELS[:, :1]], dim=1).movedim(1, -1).numpy()
    colors = straight(rgba)
    expected = enhance(torch.from_numpy(colors[..., :3]).movedim(-1, 1)).movedim(1, -1).numpy()
    expected = premultiplied(np.concatenate([expected, rgba[..., 3:]], -1))
    np.testing.assert_array_equal(enhance(torch.from_numpy(rgba).movedim(-1, 1)).movedim(1, -1).numpy(), expected)


def test_brightness_multiplies():
    expected = (PIXELS.double() * 1.06).clamp(max=255)
    assert (Enhance(brightness=1.06)(PIXELS) - expected).abs().max() <= 1


def test_contrast_moves_towards_the_mean_gray_of_each_image():
    mean = (gray(PIXELS).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    expected = mean + 0.9 * (PIXELS.double() - mean)
    assert (Enhance(contrast=0.9)(PIXELS) - expected).abs().max() <= 1


def test_color_moves_towards_gray():
    expected = gray(PIXELS) + 0.5 * (PIXELS.double() - gray(PIXELS))
    assert (Enhance(color=0.5)(PIXELS) - expected).abs().max() <= 1


def test_the_order_is_contrast_brightness_color():
    together = Enhance(contrast=0.5, brightness=1.5, color=0.2)(PIXELS)
    steps = Enhance(color=0.2)(Enhance(brightness=1.5)(Enhance(contrast=0.5)(PIXELS)))
    assert torch.equal(together, steps)
    other = Enhance(contrast=0.5)(Enhance(brightness=1.5)(PIXELS))
    assert not torch.equal(Enhance(contrast=0.5, brightness=1.5)(PIXELS), other)


@pytest.mark.parametrize("setting", ["contrast", "brightness", "color"])
def test_the_settings_are_shown(setting):
    assert f"{setting}=1.06" in repr(Enhance(**{setting: 1.06}))
