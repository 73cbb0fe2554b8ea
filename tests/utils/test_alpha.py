"""Premultiplied and straight colors."""

import numpy as np
import pytest

from relay_diffusion.utils.alpha import premultiplied, straight

COLOR, ALPHA = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
EVERY = np.stack([COLOR, 255 - COLOR, COLOR // 2, ALPHA], -1).astype(np.uint8)  # straight colors


def test_colors_are_products_with_alpha_to_the_nearest_level():
    found = premultiplied(EVERY)
    np.testing.assert_array_equal(found[..., 3], ALPHA)
    np.testing.assert_array_equal(found[..., :3], np.floor(EVERY[..., :3] * (ALPHA[..., None] / 255) + 0.5))


def test_floats_are_the_products_without_rounding():
    floats = (EVERY / 127.5 - 1).astype(np.float32)
    found = premultiplied(floats)
    assert (found.dtype, found.min(), found.max()) == (np.float32, -1, 1)
    levels = (found.astype(float) + 1) * 127.5
    np.testing.assert_allclose(levels[..., :3], EVERY[..., :3] * (ALPHA[..., None] / 255), atol=1e-4)
    np.testing.assert_array_equal(found[:, 255], floats[:, 255])


def test_a_round_trip_of_files():
    back = straight(premultiplied(EVERY))
    np.testing.assert_array_equal(back[:, 255], EVERY[:, 255])  # opaque
    assert abs(back[:, 128:].astype(int) - EVERY[:, 128:]).max() == 1
    assert (back[:, 0] == 0).all()


def test_a_round_trip_of_samples_is_exact():
    samples = np.stack([COLOR, COLOR // 2, COLOR * 0, ALPHA], -1)[COLOR <= ALPHA].astype(np.uint8)[:, None]
    np.testing.assert_array_equal(premultiplied(straight(samples[None])), samples[None])


def test_colors_above_alpha_are_clamped_and_hidden_ones_are_black():
    samples = np.array([[[200, 10, 0, 10], [9, 255, 1, 0], [255, 3, 0, 254]]], np.uint8)
    assert straight(samples).tolist() == [[[255, 255, 0, 10], [0, 0, 0, 0], [255, 3, 0, 254]]]


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4, 1), (4, 4, 3), (4, 4, 5)])
def test_images_of_other_channels_stay(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert premultiplied(pixels) is pixels
    assert straight(pixels) is pixels
