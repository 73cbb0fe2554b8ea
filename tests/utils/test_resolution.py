"""Resolutions: one number, or [height, width]."""

import pytest
from omegaconf import OmegaConf

from relay_diffusion.utils.resolution import image_size, resolution_of, size_text


@pytest.mark.parametrize("given", [[16, 24], (16, 24), OmegaConf.create([16, 24])])
def test_two_numbers_are_height_and_width(given):
    assert image_size(given) == (16, 24)
    assert resolution_of(image_size(given)) == [16, 24]
    assert size_text(image_size(given)) == "24x16 (width x height)"


@pytest.mark.parametrize("given", [16, [16, 16]])
def test_a_square_is_one_number(given):
    assert image_size(given) == (16, 16)
    assert resolution_of(image_size(given)) == 16
    assert size_text(image_size(given)) == "16x16"


@pytest.mark.parametrize("given", [0, [16, 0], [-8, 8], 2**14 + 1, [8, 2**14 + 1]])
def test_a_size_out_of_range_is_refused(given):
    with pytest.raises(ValueError, match=r"^side=.*: must lie between 1 and 16,384$"):
        image_size(given, "side")


@pytest.mark.parametrize("given", [9460, [2**14, 5462]])
def test_too_many_pixels_are_refused(given):
    message = r"^side=.*: at most 89,478,485 pixels and 16,384 on a side are supported; use smaller sides$"
    with pytest.raises(ValueError, match=message):
        image_size(given, "side")
    assert image_size([2**14, 5461], "side") == (2**14, 5461)


@pytest.mark.parametrize("given", [[], [8], [8, 8, 8], 8.0, [8.0, 8], True, [True, 8], "64", None, [[8, 8], 8]])
def test_anything_else_is_refused(given):
    with pytest.raises(ValueError, match=r"^side=.*: must be a whole number, or \[height, width\]$"):
        image_size(given, "side")
