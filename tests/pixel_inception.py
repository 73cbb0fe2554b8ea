"""What an evaluation's config names in place of Inception; tests of one process patch the sizes themselves."""

import pytest

from fake_inception import PixelFeatures, use_small_features
from relay_diffusion.errors import UserError


def pixels(weights: None) -> PixelFeatures:
    assert weights is None
    return PixelFeatures()


def pixels_in_a_process_of_their_own(weights: None) -> PixelFeatures:
    use_small_features(pytest.MonkeyPatch())
    return pixels(weights)


def damaged(weights: None) -> PixelFeatures:
    raise UserError(f"the weights {weights} are damaged")
