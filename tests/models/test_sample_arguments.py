"""Arguments of sampling from Python: accepted types and error messages."""

import math

import numpy as np
import pytest
import torch

from relay_diffusion.diffusion import BlurringCorruption, ConditionedCorruption, GaussianCorruption, LogNormal
from relay_diffusion.diffusion import TruncatedLogNormal as Truncated
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.models.relay import Relay
from relay_diffusion.samplers import BlurringSampler, EDMSampler
from support import tiny_stage, toy_denoiser

SHAPE = (2, 3, 4, 4)


@pytest.fixture
def stage():
    return tiny_stage(4)


@pytest.mark.parametrize(
    "seeds", [range(5, 7), [5, 6], (5, 6), torch.tensor([5, 6]), np.array([5, 6]), [np.int64(5), torch.tensor(6)]]
)
def test_seeds_of_any_usual_kind(stage, seeds):
    expected = stage.sample(SHAPE, [5, 6])
    assert torch.equal(stage.sample(SHAPE, seeds), expected)
    assert torch.equal(Relay({"a": stage}).sample(seeds), expected)


def test_one_seed_is_one_image(stage):
    expected = stage.sample((1, 3, 4, 4), [5])
    for seed in (5, np.int32(5), torch.tensor(5)):
        assert torch.equal(stage.sample((1, 3, 4, 4), seed), expected)
        assert torch.equal(Relay({"a": stage}).sample(seed), expected)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "seeds is empty"),
        ([0, -1], r"seeds holds -1: a seed must lie between 0 and 2\^63 - 1"),
        ([0, 2**63], r"seeds holds 9223372036854775808: "),
        ([0, 1.5], r"seeds \(list\): must be integers.*'float'"),
        (torch.tensor([0.0, 1.0]), r"seeds \(torch\.float32\): must be integers"),
        ([True, False], "seeds .*: must be integers.*got a bool"),
        (torch.tensor([True, False]), r"seeds \(torch\.bool\): must be integers"),
        ("0-1", "seeds is the text '0-1': must be integers"),
        (None, r"seeds \(NoneType\): must be integers"),
        (torch.zeros(2, 1, dtype=torch.long), r"seeds has shape \(2, 1\): must have one dimension"),
        (math.nan, r"seeds \(float\): must be integers"),
    ],
)
def test_other_seeds_are_refused(stage, seeds, message):
    for sample in (lambda: stage.sample(SHAPE, seeds), lambda: Relay({"a": stage}).sample(seeds)):
        with pytest.raises(ValueError, match=message):
            sample()


@pytest.mark.parametrize("labels", [[1, 1], (1, 1), torch.tensor([1, 1]), np.array([1, 1]), 1, torch.tensor(1)])
def test_labels_of_any_usual_kind(stage, labels):
    expected = stage.sample(SHAPE, [5, 6], torch.tensor([1, 1]))
    assert not torch.equal(expected, stage.sample(SHAPE, [5, 6]))
    assert torch.equal(stage.sample(SHAPE, [5, 6], labels), expected)
    assert torch.equal(Relay({"a": stage}).sample([5, 6], labels), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1], "labels holds 1 for 2 seeds: give one for each, or one integer for all"),
        (torch.tensor([1]), "labels holds 1 for 2 seeds"),
        ([0, 1, 0], "labels holds 3 for 2 seeds"),
        ([], "labels holds 0 for 2 seeds"),
        ([0, -2], "labels holds -2: use class indices from 0, or -1 for no class"),
        ([0, 2], r"class 2: the model has classes 0\.\.1"),
        ([0.0, 1.0], r"labels \(list\): must be integers"),
        (torch.tensor([0.0, 1.0]), r"labels \(torch\.float32\): must be integers"),
        ([True, False], "labels .*got a bool"),
        (torch.tensor([True, False]), r"labels \(torch\.bool\): must be integers"),
        ("cat", "labels is the text 'cat': must be integers"),
        (torch.eye(2, dtype=torch.long), r"labels has shape \(2, 2\): must have one dimension"),
    ],
)
def test_other_labels_are_refused(stage, labels, message):
    for sample in (lambda: stage.sample(SHAPE, [5, 6], labels), lambda: Relay({"a": stage}).sample([5, 6], labels)):
        with pytest.raises(ValueError, match=message):
            sample()


def test_images_of_8_bits_are_scaled():
    stage, pixels = tiny_stage(8, 2), torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    expected = stage.sample((2, 3, 8, 8), [5, 6], previous=to_float(pixels))
    assert torch.equal(stage.sample((2, 3, 8, 8), [5, 6], previous=pixels), expected)
    for start in (pixels, to_float(pixels), to_float(pixels).double()):
        assert torch.equal(Relay({"a": stage}).sample([5, 6], start=start), expected)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.rand(SHAPE) * 255, r"has values up to 2\d\d\S*: floats must lie in \[-1, 1\]; give uint8"),
        (torch.full(SHAPE, math.nan), "has values up to nan"),
        (torch.zeros(SHAPE, dtype=torch.int64), r"is torch\.int64: must be a tensor of uint8, or of floats"),
        (torch.zeros(SHAPE, dtype=torch.bool), r"is torch\.bool"),
        (np.zeros(SHAPE, np.uint8), "is ndarray: must be a tensor"),
        (torch.zeros(3, 4, 4), r"has shape \(3, 4, 4\): must be \(2, 3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"has shape \(1, 3, 4, 4\): must be"),
        (torch.zeros(2, 1, 4, 4), r"has shape \(2, 1, 4, 4\): must be"),
        (torch.zeros(2, 3, 6, 8), r"has (shape \(2, 3, 6, 8\)|images of 8x6 .*): must be"),
    ],
)
def test_other_images_to_start_from_are_refused(start, message):
    stage = tiny_stage(8, 2)
    with pytest.raises(ValueError, match=f"^previous {message}"):
        stage.sample((2, 3, 8, 8), [5, 6], previous=start)
    with pytest.raises(ValueError, match=f"^start {message}"):
        Relay({"a": stage}).sample([5, 6], start=start)


def test_a_relay_that_enlarges_needs_start_images(stage):
    with pytest.raises(ValueError, match=r"^start: the first stage of this relay starts from noise: remove it"):
        Relay({"a": stage}).sample([5, 6], start=torch.zeros(SHAPE))
    with pytest.raises(ValueError, match=r"^start: the first stage of this relay enlarges images of 4x4: give them"):
        Relay({"a": tiny_stage(8, 2)}).sample([5, 6])


SHAPES = [(1, 3, 4, 4), (3, 3, 4, 4), (2, 1, 4, 4), (2, 3, 4, 5), (2, 3, 0, 4), (2, 3, 4), (3, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_that_is_not_the_stages_is_refused(stage, shape):
    with pytest.raises(ValueError, match=r"^shape is \(.*\): must be \(2, 3, 4, 4\)"):
        stage.sample(shape, [5, 6])


SAMPLERS = [EDMSampler(steps=2), BlurringSampler(BlurringCorruption(Truncated(), 2), steps=8)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_refuse_invalid_inputs(sampler):
    labels, start = torch.tensor([0, 1]), torch.randn(SHAPE)
    for given, asked, message in (
        (
            torch.zeros(SHAPE, dtype=torch.uint8),
            labels,
            r"^start is torch\.uint8 of shape .*: must be floats \[B,C,H,W\]",
        ),
        (torch.zeros(3, 4, 4), labels, r"^start is torch\.float32 of shape \(3, 4, 4\)"),
        (start, [0, 1], "^labels is list: must be a tensor"),
        (start, torch.tensor([1]), r"^labels is torch\.int64 of shape \(1,\): must be integers \[2\]"),
        (start, torch.tensor([0.0, 1.0]), r"^labels is torch\.float32"),
        (start, torch.tensor([True, False]), r"^labels is torch\.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler(toy_denoiser, given, torch.randn_like, asked)
    assert sampler(toy_denoiser, start, torch.randn_like, labels).shape == SHAPE


CORRUPTIONS = [
    GaussianCorruption(LogNormal()), BlurringCorruption(Truncated(), 2), ConditionedCorruption(LogNormal(), 2),
]  # fmt: skip


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corruption_takes_one_noise_level_for_all_images(corruption):
    x0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = corruption.corrupt(x0, torch.tensor([0.5, 0.5]), noise)
    for sigma in (0.5, torch.tensor(0.5)):
        assert torch.equal(corruption.corrupt(x0, sigma, noise), expected)
    if isinstance(corruption, BlurringCorruption):
        expected = corruption.gains(torch.tensor([0.5]))
        for sigma in (0.5, torch.tensor(0.5)):
            assert torch.equal(corruption.gains(sigma), expected)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (torch.tensor([0.5]), r"^sigma is torch\.float32 of shape \(1,\): must be floats, one or \[2\]"),
        (torch.tensor([1, 2]), r"^sigma is torch\.int64"),
        ([0.5, 0.5], r"^sigma is \[0\.5, 0\.5\]: must be a number above 0, or a tensor of floats \[2\]"),
        (-0.5, r"^sigma is -0\.5"),
        (0, "^sigma is 0: must be a number above 0"),
        (math.nan, "^sigma is nan"),
        (math.inf, "^sigma is inf"),
        (True, "^sigma is True"),
        (None, "^sigma is None"),
    ],
)
def test_other_noise_levels_are_refused(stage, sigma, message):
    x = torch.randn(SHAPE)
    for corruption in CORRUPTIONS:
        with pytest.raises(ValueError, match=message):
            corruption.corrupt(x, sigma, x)
    with pytest.raises(ValueError, match=message):
        stage.denoiser(x, sigma)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruptions_refuse_images_that_are_no_floats(corruption):
    x, pixels = torch.randn(SHAPE), torch.zeros(SHAPE, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^x0 is torch\.uint8 of shape .*: must be floats"):
        corruption.corrupt(pixels, 0.5, x)
    with pytest.raises(ValueError, match=r"^noise is torch\.uint8"):
        corruption.corrupt(x, 0.5, pixels)
    with pytest.raises(ValueError, match=r"^noise has shape \(1, 3, 4, 4\): must be that of x0"):
        corruption.corrupt(x, 0.5, x[:1])
    if corruption.block > 1:
        with pytest.raises(ValueError, match=r"^previous is torch\.uint8"):
            corruption.start(torch.empty(2, 3, 8, 8), pixels, torch.randn_like)


def test_the_preconditioner_takes_one_noise_level_and_refuses_the_rest(stage):
    x, labels, denoiser = torch.randn(SHAPE), torch.tensor([0, 1]), stage.denoiser
    expected = denoiser(x, torch.tensor([0.5, 0.5]), labels)
    for sigma in (0.5, torch.tensor(0.5)):
        torch.testing.assert_close(denoiser(x, sigma, labels), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^x is torch\.uint8"):
        denoiser(torch.zeros(SHAPE, dtype=torch.uint8), 0.5)
    with pytest.raises(ValueError, match=r"^labels is list"):
        denoiser(x, 0.5, [0, 1])
    with pytest.raises(ValueError, match=r"^labels is torch\.int64 of shape \(1,\)"):
        denoiser(x, 0.5, torch.tensor([1]))
