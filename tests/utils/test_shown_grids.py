"""Grids of images, enlarged and with titles."""

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.utils.pictures import TITLE_HEIGHT, image_grid, side_by_side, titled


@pytest.mark.parametrize(("shape", "shown"), [((16, 16), 128), ((50, 50), 150), ((128, 128), 128), ((200, 9), 200)])
def test_small_images_are_enlarged_by_an_integer_factor(shape, shown):
    images = torch.randint(0, 256, (3, 3, *shape), dtype=torch.uint8)
    picture = np.asarray(image_grid(images, columns=2, least_side=128))
    factor = shown // shape[0]
    height, width = (side * factor for side in shape)
    assert picture.shape == (2 * height + 2, 2 * width + 2, 3)
    for number, (y, x) in enumerate([(0, 0), (0, width + 2), (height + 2, 0)]):
        cell = picture[y : y + height, x : x + width]
        np.testing.assert_array_equal(cell, images[number].permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1))
    np.testing.assert_array_equal(np.asarray(image_grid(images, 2)), np.asarray(image_grid(images, 2, least_side=8)))


def test_a_title_is_above_its_picture_and_fits():
    picture = Image.new("RGB", (10, 20), "blue")
    both = titled(picture, "relay: 256x256")
    pixels = np.asarray(both)
    assert both.height == 20 + TITLE_HEIGHT
    assert (pixels[TITLE_HEIGHT:, :10] == [0, 0, 255]).all()
    text = np.argwhere((pixels[:TITLE_HEIGHT] < 128).all(-1))
    assert 20 < len(text) < 10 * TITLE_HEIGHT * 10
    assert 60 < text[:, 1].max() < both.width - 1  # the last letter is not cut
    assert side_by_side([both, titled(picture, "base")]).height == both.height
