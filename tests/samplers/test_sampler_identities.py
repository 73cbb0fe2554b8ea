"""Mathematical properties of the samplers: Heun, second order, exact marginals."""

import math
from itertools import pairwise

import pytest
import torch

from recorder import Recorder
from relay_diffusion.diffusion import BlurringCorruption, LinearCorruption, TruncatedLogNormal
from relay_diffusion.diffusion.dct import block_dct, block_filter, block_idct
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.diffusion.noise import block_noise
from relay_diffusion.diffusion.schedule import karras_sigmas
from relay_diffusion.samplers import BlurringSampler, EDMSampler, MultistepSampler
from support import Replay, toy_denoiser

SCHEDULE = TruncatedLogNormal()
SHARP = BlurringCorruption(TruncatedLogNormal(prob_length=1.0), blur_sigma_max=0.0, block_strength=0.0)
EXACT = {"atol": 1e-11, "rtol": 1e-11}


def relay_with_noise():
    return BlurringSampler(BlurringCorruption(SCHEDULE), steps=16, s_noise=0.3)


def multistep_with_noise():
    return MultistepSampler(BlurringCorruption(SCHEDULE), steps=16, sigma_max=0.85, s_noise=0.3)


def images(batch=2, size=8):
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def no_noise(x):
    return torch.zeros_like(x)


def heun(denoise, x, sigmas, labels):
    """The trapezoidal rule for dx/dsigma = (x - D(x; sigma)) / sigma, then the estimate at the last level."""
    ones = torch.ones(len(x), dtype=x.dtype)
    for now, then in pairwise(sigmas):
        slope = (x - denoise(x, now * ones, labels)) / now
        euler = x + (then - now) * slope
        slope_there = (euler - denoise(euler, then * ones, labels)) / then
        x = x + (then - now) * (slope + slope_there) / 2
    return denoise(x, sigmas[-1] * ones, labels)


LABELS = torch.tensor([3, 7])


def test_relay_without_blur_and_noise_is_heun():
    start, noise = images(), images()
    sampler = BlurringSampler(SHARP, steps=12, s_noise=0.0)
    got = sampler(toy_denoiser, start, Replay([noise]).randn_like, LABELS)
    x = start + sampler.sigmas[0] * noise
    torch.testing.assert_close(got, heun(toy_denoiser, x, sampler.sigmas, LABELS), **EXACT)


def test_edm_without_churn_and_noise_is_heun():
    noise = images()
    got = EDMSampler(steps=12)(toy_denoiser, noise, Replay([]).randn_like, LABELS)
    sigmas = karras_sigmas(12, 0.002, 80.0, 7.0).tolist()
    torch.testing.assert_close(got, heun(toy_denoiser, 80.0 * noise, sigmas, LABELS), **EXACT)


def noisy_steps(move, x, draws, sigmas, eta, denoise):
    """Steps of the docstrings, slope by slope: the estimate x0^, then x - sigma (d + d')/2, are moved alike."""
    ones = torch.ones(len(x), dtype=torch.float64)
    for now, then in pairwise(sigmas):
        gamma = math.sqrt(1 - eta**2) * then / now
        denoised = denoise(x, now * ones, LABELS).double()
        euler = gamma * x + move(denoised, now, then, gamma) + eta * then * draws()
        slope = (x - denoised) / now
        slope_there = (euler - denoise(euler, then * ones, LABELS).double()) / then
        corrected = x - now * (slope + slope_there) / 2
        x = gamma * x + move(corrected, now, then, gamma) + eta * then * draws()
    return denoise(x, sigmas[-1] * ones, LABELS).double()


@pytest.mark.parametrize("of_network", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "corruption",
    [
        *(BlurringCorruption(SCHEDULE, block, blur_sigma_max=2.0, block_strength=0.4) for block in (2, 4, 16)),
        LinearCorruption(SCHEDULE, 4, block_strength=0.4),
    ],
    ids=["blurring, 2", "blurring, 4", "blurring, 16", "linear, 4"],
)
def test_relay_steps_equal_the_formula(corruption, of_network):
    block = corruption.block
    sampler = BlurringSampler(corruption, steps=10, s_noise=0.3)
    start, white = images(size=32), [images(size=32) for _ in range(2 * (2 * len(sampler.sigmas) - 1))]
    replay = Replay(white)

    def estimate(x, sigma, labels):
        return toy_denoiser(x, sigma, labels).to(of_network)

    def move(x, now, then, gamma):
        first, last = (corruption.gains(torch.tensor([level], dtype=torch.float64)) for level in (now, then))
        gains = (last - gamma * first).tile(1, 1, 32 // block, 32 // block)
        return block_idct(block_dct(x, block) * gains, block)

    def draws():
        first = replay.randn_like(start)
        return first + 0.4 * block_noise(replay.randn_like(start), block)

    x = start + sampler.sigmas[0] * draws()
    expected = noisy_steps(move, x, draws, sampler.sigmas, 0.3, estimate)
    assert replay.left == 0
    got = sampler(estimate, start, Replay(white).randn_like, LABELS)
    # a network in single precision may answer a state that differs in its last digit by another last digit
    tolerance = 1e-11 if of_network == torch.float64 else 1e-5
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("of_network", [torch.float64, torch.float32])
def test_edm_steps_equal_the_formula(of_network):
    sampler = EDMSampler(steps=8, sde_scale=0.3)
    white = [images() for _ in range(2 * 7 + 1)]

    def estimate(x, sigma, labels):
        return toy_denoiser(x, sigma, labels).to(of_network)

    replay = Replay(white)
    start = replay.randn_like(images())
    expected = noisy_steps(
        lambda x, now, then, gamma: (1 - gamma) * x,  # noqa: ARG005
        80.0 * start,
        lambda: replay.randn_like(start),
        sampler.sigmas[:-1],
        0.3,
        estimate,
    )
    assert replay.left == 0
    got = sampler(estimate, start, Replay(white[1:]).randn_like, LABELS)
    tolerance = 1e-11 if of_network == torch.float64 else 1e-4
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "sampler", [EDMSampler(steps=5, churn=3.0, sde_scale=0.3), relay_with_noise(), multistep_with_noise()]
)
def test_outputs_of_denoiser_and_noise_source_are_not_modified(sampler):
    """Steps modify only their own memory in place."""
    handed, copies = [], []

    def keep(x):
        handed.append(x)
        copies.append(x.clone())
        return x

    def denoise(x, sigma, labels):
        return keep(toy_denoiser(keep(x), sigma, labels))

    sampler(denoise, keep(images()), lambda x: keep(torch.randn_like(x)), LABELS)
    assert len(handed) > 20
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(handed, copies, strict=True))


@pytest.mark.parametrize("sampler", [EDMSampler(steps=5), relay_with_noise(), multistep_with_noise()])
def test_a_network_may_reuse_its_output_memory(sampler):
    """A network captured in a CUDA graph does."""
    start, memory = images(), torch.empty(2, 3, 8, 8)

    def overwriting(x, sigma, labels):
        return memory.copy_(toy_denoiser(x, sigma, labels))

    def fresh(x, sigma, labels):
        return toy_denoiser(x, sigma, labels).float()

    results = [
        sampler(denoise, start, PerImageGenerator([1, 2]).randn_like, LABELS) for denoise in (fresh, overwriting)
    ]
    assert torch.equal(*results)


SD = 0.5
LOW, HIGH = 0.05, 2.0


def gaussian_denoiser(x, sigma, _labels):
    """The exact denoiser of pixels drawn from N(0, SD^2)."""
    return SD**2 * x / (SD**2 + sigma[:, None, None, None] ** 2)


def edm_of(steps):
    return EDMSampler(steps=steps, sigma_min=LOW, sigma_max=HIGH)


def relay_of(steps):
    return BlurringSampler(SHARP, steps, LOW, HIGH, truncation_sigma=2 * HIGH, s_noise=0.0)


def final_std(sampler):
    """Standard deviation of the images that a start of N(0, SD^2 + HIGH^2) leads to: the sampler is linear."""
    unit = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    if isinstance(sampler, EDMSampler):
        response = sampler(gaussian_denoiser, unit / HIGH, no_noise)
    else:
        response = sampler(gaussian_denoiser, unit, no_noise)
    return response[0, 0, 0, 0].item() * math.hypot(SD, HIGH)


# the ODE x' = sigma x / (SD^2 + sigma^2) keeps std sqrt(SD^2 + sigma^2); the last step multiplies by D's factor
EXACT_STD = math.hypot(SD, LOW) * SD**2 / (SD**2 + LOW**2)


@pytest.mark.parametrize("sampler_of", [edm_of, relay_of])
def test_error_falls_with_the_square_of_the_steps(sampler_of):
    errors = [abs(final_std(sampler_of(intervals + 1)) - EXACT_STD) for intervals in (16, 32, 64, 128)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(1.8 < order < 2.2 for order in orders), orders


@pytest.mark.parametrize("sampler_of", [edm_of, relay_of])
def test_many_steps_reach_the_exact_standard_deviation(sampler_of):
    assert final_std(sampler_of(300)) == pytest.approx(EXACT_STD, rel=1e-4)


SOURCES = 64
PIXELS = 8


class Impulses:
    """Noise of linear response theory: the j-th draw is 1 in all pixels of image j of the batch, else 0."""

    def __init__(self, first=0):
        self.next = first

    def randn_like(self, x):
        noise = torch.zeros_like(x)
        noise[self.next] = 1
        self.next += 1
        assert self.next < len(x)  # the last image stays without noise: it is the mean
        return noise


class Oracle:
    """Knows the clean image x0. At the end of an Euler step it repeats the slope of the step's beginning.

    So the corrected step repeats the Euler step, with fresh noise, and every state is the end of Euler steps.
    """

    def __init__(self, x0):
        self.x0, self.slope = x0, None

    def __call__(self, x, sigma, _labels):
        if self.slope is None:
            self.slope = (x - self.x0) / sigma[:, None, None, None]
            return self.x0
        repeated, self.slope = x - sigma[:, None, None, None] * self.slope, None
        return repeated


def clean_images():
    return images(1, PIXELS).expand(SOURCES, -1, -1, -1)


def relay_states(corruption, s_noise):
    """x0 and the recorded calls of a relay that starts from the exact blurred image, one noise source an image."""
    sampler = BlurringSampler(corruption, steps=12, sigma_max=2.0, truncation_sigma=1.0, s_noise=s_noise)
    x0 = clean_images()
    start = block_filter(x0, corruption.gains(torch.tensor(sampler.sigmas[:1], dtype=torch.float64)))
    recorder = Recorder(Oracle(x0))
    sampler(recorder, start, Impulses().randn_like)
    assert len(recorder.states) == sampler.evaluations > 10
    return x0, recorder


def spread(state):
    """Root of the summed squared responses to all noise sources, of each pixel: [C,H,W]."""
    return ((state - state[-1:]) ** 2).sum(0).sqrt()


@pytest.mark.parametrize("s_noise", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "corruption",
    [
        BlurringCorruption(SCHEDULE, 2, blur_sigma_max=2.0, block_strength=0.0),
        BlurringCorruption(SCHEDULE, 4, blur_sigma_max=2.0, block_strength=0.0),
        LinearCorruption(SCHEDULE, 4, block_strength=0.0),
    ],
    ids=["blurring, 2", "blurring, 4", "linear, 4"],
)
def test_relay_keeps_the_filtered_image_as_its_mean(corruption, s_noise):
    x0, recorder = relay_states(corruption, s_noise)
    for state, sigma in zip(recorder.states, recorder.sigmas, strict=True):
        blurred = corruption.corrupt(x0[:1], sigma[:1], torch.zeros_like(x0[:1]))
        torch.testing.assert_close(state[-1:], blurred, **EXACT)


@pytest.mark.parametrize("s_noise", [0.0, 0.2, 1.0])
def test_relay_keeps_sigma_as_its_standard_deviation(s_noise):
    _, recorder = relay_states(BlurringCorruption(SCHEDULE, block_strength=0.0), s_noise)
    for state, sigma in zip(recorder.states, recorder.sigmas, strict=True):
        torch.testing.assert_close(spread(state), sigma[0].expand_as(state[0]), **EXACT)


@pytest.mark.parametrize("s_noise", [0.0, 0.2, 1.0])
def test_relay_keeps_the_share_of_block_noise(s_noise):
    block, strength = 4, 0.5
    corruption = BlurringCorruption(SCHEDULE, block, block_strength=strength)
    _, recorder = relay_states(corruption, s_noise)
    # noise that is equal in all pixels leaves the box filter `block` times as large
    gain = math.sqrt(1 + (strength * block) ** 2)
    for state, sigma in zip(recorder.states, recorder.sigmas, strict=True):
        torch.testing.assert_close(spread(state), gain * sigma[0].expand_as(state[0]), **EXACT)


@pytest.mark.parametrize("settings", [{}, {"sde_scale": 0.3}, {"sde_scale": 1.0}, {"churn": 4.0}, {"churn": 99.0}])
def test_edm_keeps_the_image_and_sigma(settings):
    sampler = EDMSampler(steps=8, **settings)
    x0 = clean_images()
    first = Impulses().randn_like(x0)  # the start is the first noise source
    recorder = Recorder(Oracle(x0))
    start = first + x0 / sampler.sigmas[0]
    sampler(recorder, start, Impulses(first=1).randn_like)
    assert len(recorder.states) == 15
    for state, sigma in zip(recorder.states, recorder.sigmas, strict=True):
        torch.testing.assert_close(state[-1:], x0[:1], **EXACT)
        torch.testing.assert_close(spread(state), sigma[0].expand_as(state[0]), **EXACT)
