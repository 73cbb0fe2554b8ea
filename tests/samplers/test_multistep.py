"""MultistepSampler: order two, exact marginals, its Gaussian form, early stop."""

import math
from itertools import pairwise

import pytest
import torch

from relay_diffusion.diffusion import (
    BlurringCorruption,
    GaussianCorruption,
    LinearCorruption,
    LogNormal,
    TruncatedLogNormal,
)
from relay_diffusion.diffusion.dct import block_dct, block_filter, block_idct
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.samplers import BlurringSampler, MultistepSampler
from support import toy_denoiser

GAUSSIAN = GaussianCorruption(LogNormal())
BLURRING = BlurringCorruption(TruncatedLogNormal(), block=4, block_strength=0.0)
LINEAR = LinearCorruption(TruncatedLogNormal(), block=4, block_strength=0.0)
CORRUPTIONS = pytest.mark.parametrize(
    "corruption", [GAUSSIAN, BLURRING, LINEAR], ids=["gaussian", "blurring", "linear"]
)
LABELS = torch.tensor([3, 7])
MEAN, SD = 0.8, 0.2  # of the mixture's two components: N(+-MEAN, SD^2)


def images(batch=2, size=8):
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def no_noise(x):
    return torch.zeros_like(x)


class Mixture:
    """Images whose block DCT coefficients are independent draws of the mixture; all of it in closed form."""

    def __init__(self, corruption, size):
        self.corruption, self.size = corruption, size
        self.block = corruption.block

    def _gains(self, sigma):
        gains = self.corruption.gains(torch.tensor([sigma], dtype=torch.float64))
        return gains.tile(1, 1, self.size // self.block, self.size // self.block)

    def denoise(self, x, sigma, _labels):
        level = sigma[0].item()
        gains, y = self._gains(level), block_dct(x, self.block)
        variance = gains**2 * SD**2 + level**2
        estimates, logits = [], []
        for mean in (MEAN, -MEAN):
            estimates.append(mean + gains * SD**2 * (y - gains * mean) / variance)
            logits.append(-((y - gains * mean) ** 2) / (2 * variance))
        weights = torch.stack(logits).softmax(0)
        return block_idct((weights * torch.stack(estimates)).sum(0), self.block)

    def quantiles(self, y, sigma):
        gains = self._gains(sigma)
        spread = (gains**2 * SD**2 + sigma**2).sqrt()
        return sum(torch.special.ndtr((y - gains * mean) / spread) for mean in (MEAN, -MEAN)) / 2

    def carried(self, x, sigma, sigma_next):
        """The flow of one coefficient keeps its quantile: found by bisection."""
        wanted = self.quantiles(block_dct(x, self.block), sigma)
        low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.quantiles(middle, sigma_next) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return block_idct((low + high) / 2, self.block)


@CORRUPTIONS
def test_second_order_on_a_gaussian_mixture(corruption):
    high, low = 0.8, 0.05
    mixture, noise = Mixture(corruption, 8), images(8)
    start = noise if corruption is GAUSSIAN else torch.zeros_like(noise)
    exact_state = mixture.carried(high * noise, high, low)
    exact = mixture.denoise(exact_state, torch.tensor([low]), None)
    errors = []
    for steps in (20, 40, 80, 160):
        sampler = MultistepSampler(corruption, steps, low, high)
        errors.append((sampler(mixture.denoise, start, lambda _: noise) - exact).abs().mean().item())
    assert errors[-1] < 1e-3
    for coarse, fine in pairwise(errors):
        assert 3.3 < coarse / fine < 5.0


@pytest.mark.parametrize("corruption", [BLURRING, LINEAR], ids=["blurring", "linear"])
def test_both_samplers_of_a_relay_stage_converge_to_the_same_solution(corruption):
    high, low = 0.8, 0.05
    mixture, noise = Mixture(corruption, 8), images(8)
    start, exact = torch.zeros_like(noise), mixture.carried(high * noise, high, low)
    exact = mixture.denoise(exact, torch.tensor([low]), None)
    apart = []
    for steps in (20, 40, 80, 160):
        samplers = (
            MultistepSampler(corruption, steps, low, high),
            BlurringSampler(corruption, steps, low, high, truncation_sigma=1.0, s_noise=0.0),
        )
        results = [sampler(mixture.denoise, start, lambda _: noise) for sampler in samplers]
        apart.append((results[0] - results[1]).abs().mean().item())
    assert max((result - exact).abs().mean() for result in results) < 0.01
    for coarse, fine in pairwise(apart):
        assert coarse / fine > 1.7


@pytest.mark.parametrize("s_noise", [0.0, 0.2, 0.7, 1.0])
@CORRUPTIONS
def test_an_oracle_denoiser_keeps_the_exact_marginals(corruption, s_noise):
    """Each draw of noise has a batch entry of its own, so the squared residuals of all entries add up to sigma^2."""
    sampler = MultistepSampler(corruption, 5, 0.02, 0.8, s_noise=s_noise)
    x0 = images(1).expand(5, -1, -1, -1)
    draws = iter(torch.eye(5, dtype=torch.float64))
    seen = []

    def noise(x):
        return next(draws).view(5, 1, 1, 1).expand(x.shape)

    def oracle(x, sigma, _labels):
        residual = x - block_filter(x0, corruption.gains(sigma[:1]))
        seen.append((sigma[0].item(), residual.square().sum(0).sqrt()))
        return x0

    if corruption is GAUSSIAN:
        start = noise(x0) + x0 / sampler.sigmas[0]
    else:
        start = block_filter(x0, corruption.gains(torch.tensor(sampler.sigmas[:1], dtype=torch.float64)))
    assert torch.equal(sampler(oracle, start, noise), x0)
    assert [sigma for sigma, _ in seen] == sampler.sigmas
    for sigma, spread in seen:
        torch.testing.assert_close(spread, torch.full_like(spread, sigma), rtol=1e-9, atol=0)


def dpm_solver(sigmas, noise):
    """DPM-Solver++(2M) in steps h of lambda, as in its paper, with the integral of the linear term exact."""
    ones, x, before = torch.ones(2, dtype=torch.float64), sigmas[0] * noise, None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        estimate, h = toy_denoiser(x, sigma * ones, LABELS), math.log(sigma / sigma_next)
        moved = math.exp(-h) * x - math.expm1(-h) * estimate
        if before is not None:
            h_before = math.log(sigmas[i - 1] / sigma)
            moved = moved + (h - 1 + math.exp(-h)) / h_before * (estimate - before)
        x, before = moved, estimate
    return toy_denoiser(x, sigmas[-1] * ones, LABELS)


@pytest.mark.parametrize("stop", [None, 1.0], ids=["whole", "stopped early"])
def test_equals_dpm_solver_of_second_order_without_blur(stop):
    sampler, noise = MultistepSampler(GAUSSIAN, 9, 0.01, 50.0), images()
    if stop is not None:
        sampler = sampler.stopping_at(stop)
    expected = dpm_solver(sampler.sigmas, noise)
    torch.testing.assert_close(sampler(toy_denoiser, noise, no_noise, LABELS), expected, atol=1e-8, rtol=0)


def test_fresh_noise_is_that_of_the_corruption():
    """With block noise, as in training: x' = F[A'] x0 + s n + s_noise sigma' n'."""
    corruption, s_noise = BlurringCorruption(TruncatedLogNormal(), block=4, block_strength=0.15), 0.6
    sampler, x0, states = MultistepSampler(corruption, 2, 0.1, 0.8, s_noise=s_noise), images(), []

    def oracle(x, _sigma, _labels):
        states.append(x.clone())
        return x0

    gains = corruption.gains(torch.tensor(sampler.sigmas, dtype=torch.float64))
    start = block_filter(x0, gains[:1])
    sampler(oracle, start, PerImageGenerator([1, 2]).randn_like)
    randn_like = PerImageGenerator([1, 2]).randn_like
    noise, fresh = corruption.draw_noise(x0, randn_like), corruption.draw_noise(x0, randn_like)
    high, low = sampler.sigmas
    torch.testing.assert_close(states[0], start + high * noise, atol=1e-12, rtol=0)
    expected = block_filter(x0, gains[1:]) + low * (math.sqrt(1 - s_noise**2) * noise + s_noise * fresh)
    torch.testing.assert_close(states[1], expected, atol=1e-12, rtol=0)


@CORRUPTIONS
def test_batch_splits_give_the_same_images(corruption):
    sampler, start = MultistepSampler(corruption, 4, 0.02, 0.8, s_noise=0.3), images(3)
    labels = torch.tensor([1, 2, 3])
    together = sampler(toy_denoiser, start, PerImageGenerator([5, 6, 7]).randn_like, labels)
    for i in range(3):
        alone = sampler(toy_denoiser, start[i : i + 1], PerImageGenerator([5 + i]).randn_like, labels[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-12, rtol=0)


def test_one_step_is_the_estimate_at_the_start():
    sampler, noise = MultistepSampler(BLURRING, 1, 0.02, 0.6), images()
    start = images()
    expected = toy_denoiser(start + 0.6 * noise, 0.6 * torch.ones(2, dtype=torch.float64), LABELS)
    assert sampler.evaluations == 1
    got = sampler(toy_denoiser, start, lambda _: noise, LABELS)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_stopping_early_returns_the_estimate_there():
    sampler, noise, seen = MultistepSampler(GAUSSIAN, 6, 0.01, 50.0), images(), []

    def keep(x, sigma, labels):
        seen.append(sigma[0].item())
        return toy_denoiser(x, sigma, labels)

    stopped = sampler.stopping_at(1.0)
    stopped(keep, noise, no_noise, LABELS)
    assert seen == [sigma for sigma in sampler.sigmas if sigma > 1] + [1.0]
    assert stopped.evaluations == len(seen) < sampler.evaluations == 6
    on_grid = sampler.stopping_at(sampler.sigmas[3])
    assert on_grid.sigmas == sampler.sigmas[:4]
    for level in (50.0, 0.009):
        with pytest.raises(ValueError, match=f"cannot stop at sigma {level}"):
            sampler.stopping_at(level)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"s_noise": 1.1}, "s_noise=1.1"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"rho": 0.0}, "rho"),
        ({"corruption": BLURRING}, "beyond the end of the corruption's schedule"),
        ({"corruption": LogNormal()}, "corruption=LogNormal: has no gains"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        MultistepSampler(**{"corruption": GAUSSIAN, **settings})
