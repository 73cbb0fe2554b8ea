"""Corruption of a conditioned cascade: noise on the image and on its condition."""

import math

import pytest
import torch

from relay_diffusion.diffusion import ConditionedCorruption, GaussianCorruption, LogNormal


def corruption(**options):
    return ConditionedCorruption(LogNormal(), **{"block": 2, **options})


def test_defaults():
    default = ConditionedCorruption(LogNormal())
    assert (default.block, default.condition_noise_max, default.condition_noise) == (4, 0.5, 0.1)


def test_images_are_corrupted_as_in_a_first_stage():
    x0, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 3.0])
    noise = corruption().draw_noise(x0, torch.randn_like)
    assert torch.equal(
        corruption().corrupt(x0, sigma, noise), GaussianCorruption(LogNormal()).corrupt(x0, sigma, noise)
    )


def test_the_condition_is_the_enlarged_block_mean():
    x0 = torch.randn(2, 3, 2, 2).repeat_interleave(16, -1).repeat_interleave(16, -2)  # flat far from the edges
    quiet = corruption(block=4)
    seen = quiet.condition(quiet.small(x0), torch.zeros(2), torch.randn(2, 3, 8, 8))
    assert seen.shape == x0.shape
    for y, x in ((3, 3), (3, 28), (28, 3), (28, 28)):
        torch.testing.assert_close(seen[..., y, x], x0[..., y, x])
    row = seen[0, 0, 3]
    assert len(row[12:20].unique()) > 2  # an edge is not a step, as repeated pixels would make it


def test_each_condition_has_noise_of_its_own_level():
    small, noise, level = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([0.0, 0.1, 0.5])
    seen, clean = (corruption().condition(small, s, noise) for s in (level, torch.zeros(3)))
    unit = corruption().condition(torch.zeros_like(small), torch.ones(3), noise)
    torch.testing.assert_close(seen - clean, level[:, None, None, None] * unit)
    assert torch.equal(seen[0], clean[0])


def test_training_levels_are_uniform_up_to_the_largest():
    levels = corruption(condition_noise_max=0.4).draw_condition_levels(20_000)
    quantiles = levels.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(quantiles, torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.01)
    assert levels.max() < 0.4


def test_sampling_starts_from_noise_and_needs_the_previous_image():
    like, small = torch.empty(1, 3, 8, 8), torch.randn(1, 3, 4, 4)
    drawn = torch.randn(1, 3, 8, 8)
    assert corruption().start(like, small, lambda _: drawn) is drawn
    with pytest.raises(ValueError, match="give `previous`"):
        corruption().start(like, None, torch.randn_like)
    with pytest.raises(ValueError, match="enlarged 4 times are not of"):
        corruption(block=4).start(like, small, torch.randn_like)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 1}, "^block=1: "),
        ({"condition_noise": -0.1}, "must lie between 0 and"),
        ({"condition_noise_max": math.inf}, "^condition_noise_max=inf: "),
        ({"condition_noise": 0.3, "condition_noise_max": 0.2}, "condition_noise=0.3: must lie .*=0.2"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        corruption(**options)


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_condition_noise_may_equal_its_limits(level):
    assert corruption(condition_noise=level, condition_noise_max=0.5).condition_noise == level
