"""Noise levels: quantiles of a log-normal, and Karras's grid."""

import math
from statistics import NormalDist

import pytest
import torch

from relay_diffusion.diffusion import LogNormal, TruncatedLogNormal
from relay_diffusion.diffusion.schedule import karras_sigmas

NORMAL = NormalDist()
SCHEDULES = [LogNormal(), LogNormal(-0.4, 0.7), TruncatedLogNormal(), TruncatedLogNormal(-0.5, 1.5, 0.6)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_level_inverts_sigma(schedule):
    level = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    torch.testing.assert_close(schedule.level(schedule.sigma(level)), level, atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", [0.01, 0.3, 0.5, 0.9])
def test_log_normal_sigma_is_the_quantile(level):
    sigma = LogNormal(-0.4, 0.7).sigma(torch.tensor(level, dtype=torch.float64))
    assert sigma.item() == pytest.approx(math.exp(-0.4 + 0.7 * NORMAL.inv_cdf(level)), rel=1e-12)


def test_median_of_the_log_normal_is_exp_p_mean():
    assert LogNormal(-0.4, 0.7).sigma(torch.tensor(0.5).double()).item() == pytest.approx(math.exp(-0.4))


@pytest.mark.parametrize("prob_length", [0.5, 0.89, 0.93])
def test_truncated_level_one_is_the_prob_length_quantile(prob_length):
    schedule = TruncatedLogNormal(-1.2, 1.2, prob_length)
    expected = math.exp(-1.2 + 1.2 * NORMAL.inv_cdf(prob_length))
    assert schedule.sigma(torch.ones(1).double()).item() == pytest.approx(expected, rel=1e-12)


def test_small_levels_keep_their_digits_in_single_precision():
    """(1 + erf(z / sqrt 2)) / 2 would lose precision by cancellation at these levels."""
    sigma = torch.tensor([1e-3, 3e-3, 0.0075])
    level = torch.tensor([NORMAL.cdf((math.log(s) + 1.2) / 1.2) for s in sigma.tolist()])
    torch.testing.assert_close(LogNormal().level(sigma), level, atol=0, rtol=1e-5)


def test_truncated_level_is_the_share_of_the_kept_probability():
    schedule, sigma = TruncatedLogNormal(-1.2, 1.2, 0.8), 0.4
    expected = NORMAL.cdf((math.log(sigma) + 1.2) / 1.2) / 0.8
    assert schedule.level(torch.tensor(sigma).double()).item() == pytest.approx(expected, rel=1e-6)


def test_truncated_with_all_the_probability_is_the_log_normal():
    level = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(TruncatedLogNormal(-0.4, 0.7, 1.0).sigma(level), LogNormal(-0.4, 0.7).sigma(level))


def test_published_defaults():
    for schedule in (LogNormal(), TruncatedLogNormal()):
        assert (schedule.p_mean, schedule.p_std) == (-1.2, 1.2)
    floor = 0.93 * NORMAL.cdf((math.log(0.0075) + 1.2) / 1.2)
    assert TruncatedLogNormal().level_floor == pytest.approx(floor, rel=1e-9)


def test_log_normal_draws_have_the_right_moments():
    logs = LogNormal(-0.4, 0.7).draw(100_000, "cpu", torch.float64).log()
    assert logs.mean().item() == pytest.approx(-0.4, abs=0.011)  # five standard errors
    assert logs.std().item() == pytest.approx(0.7, abs=0.008)


def test_truncated_draws_have_uniform_levels_above_the_floor():
    schedule = TruncatedLogNormal(-1.2, 1.2, 0.8)
    level = schedule.level(schedule.draw(100_000, "cpu", torch.float64)).sort().values
    uniform = torch.arange(100_000, dtype=torch.float64) / 100_000
    assert (level - uniform.clamp(min=schedule.level_floor)).abs().max() < 0.008  # Kolmogorov's distance


def test_no_draw_lies_outside_the_floor_and_level_one():
    schedule = TruncatedLogNormal(-1.2, 1.2, 0.8, sigma_floor=0.3)
    sigma = schedule.draw(1000, "cpu", torch.float64)
    floor, top = schedule.sigma(torch.tensor([schedule.level_floor, 1.0], dtype=torch.float64)).tolist()
    assert sigma.min().item() == pytest.approx(floor, rel=1e-12)  # about four draws in ten lie below it
    assert sigma.max().item() < top


def test_floor_is_the_published_product():
    schedule = TruncatedLogNormal(-1.2, 1.2, 0.6, sigma_floor=math.exp(-1.2))  # the median: Phi = 1/2
    assert schedule.level_floor == pytest.approx(0.3, rel=1e-12)
    assert schedule.level(schedule.from_uniform(torch.zeros(1).double())).item() == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("schedule", [LogNormal(), TruncatedLogNormal()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_has_the_size_and_dtype_asked_for(schedule, dtype):
    sigma = schedule.draw(7, "cpu", dtype)
    assert sigma.shape == (7,)
    assert sigma.dtype == dtype


@pytest.mark.parametrize("schedule", [LogNormal, TruncatedLogNormal])
@pytest.mark.parametrize("p_std", [0.0, -1.0])
def test_a_spread_that_is_not_positive_is_refused(schedule, p_std):
    with pytest.raises(ValueError, match="p_std"):
        schedule(p_std=p_std)


@pytest.mark.parametrize("prob_length", [0.0, -0.5])
def test_a_prob_length_that_is_not_positive_is_refused(prob_length):
    with pytest.raises(ValueError, match="prob_length"):
        TruncatedLogNormal(prob_length=prob_length)


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0, 7.0])
def test_karras_grid_runs_from_sigma_max_down_to_sigma_min(rho):
    sigmas = karras_sigmas(18, 0.002, 80.0, rho)
    assert sigmas.shape == (18,)
    assert sigmas.dtype == torch.float64
    assert sigmas[0].item() == pytest.approx(80.0, rel=1e-12)
    assert sigmas[-1].item() == pytest.approx(0.002, rel=1e-6)
    assert (sigmas.diff() < 0).all()


def test_karras_grid_of_rho_one_is_linear():
    expected = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(karras_sigmas(5, 1.0, 5.0, 1.0), expected)


@pytest.mark.parametrize(("rho", "sigma_max", "middle"), [(2, 9.0, 4.0), (3, 27.0, 8.0), (7, 3.0**7, 2.0**7)])
def test_karras_middle_is_the_mean_of_the_roots(rho, sigma_max, middle):
    assert karras_sigmas(3, 1.0, sigma_max, rho)[1].item() == pytest.approx(middle, rel=1e-12)


@pytest.mark.parametrize(
    ("steps", "sigma_min", "sigma_max", "rho"),
    [(0, 0.1, 1.0, 7), (4, 0.0, 1.0, 7), (4, -0.1, 1.0, 7), (4, 1.0, 1.0, 7), (4, 2.0, 1.0, 7), (4, 0.1, 1.0, 0)],
)
def test_impossible_grids_are_refused(steps, sigma_min, sigma_max, rho):
    with pytest.raises(ValueError, match=r"^(steps|sigma_min|rho)="):
        karras_sigmas(steps, sigma_min, sigma_max, rho)


def test_a_schedule_beyond_the_distribution_is_for_sampling_only():
    schedule = TruncatedLogNormal(prob_length=1.05)
    with pytest.raises(ValueError, match=r"prob_length=1\.05"):
        schedule.draw(4, "cpu")
    with pytest.raises(ValueError, match="sigma_floor"):
        TruncatedLogNormal(sigma_floor=0)
    assert TruncatedLogNormal(prob_length=1.0).draw(4, "cpu").shape == (4,)


@pytest.mark.parametrize("schedule", [LogNormal, TruncatedLogNormal])
@pytest.mark.parametrize("settings", [{"p_mean": math.nan}, {"p_mean": math.inf}, {"p_std": math.inf}, {"p_std": 0}])
def test_a_distribution_without_numbers_is_refused(schedule, settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}="):
        schedule(**settings)


@pytest.mark.parametrize(("prob_length", "sigma_floor"), [(0.2, 0.2), (0.93, 2.0), (1.0, 1e9), (1.5, 1e9)])
def test_a_floor_above_all_noise_is_refused(prob_length, sigma_floor):
    with pytest.raises(ValueError, match=f"sigma_floor={sigma_floor}: no noise level .* lies above it"):
        TruncatedLogNormal(prob_length=prob_length, sigma_floor=sigma_floor)


def test_a_grid_has_at_most_so_many_levels():
    assert len(karras_sigmas(100_000, 0.1, 1.0, 7.0)) == 100_000
    with pytest.raises(ValueError, match=r"^steps=100001: "):
        karras_sigmas(100_001, 0.1, 1.0, 7.0)
