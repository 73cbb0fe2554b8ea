"""Options of the samplers, their evaluations, and one seed per image."""

import math
from unittest.mock import Mock

import pytest
import torch

from recorder import Recorder
from relay_diffusion.diffusion import BlurringCorruption, TruncatedLogNormal
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.diffusion.schedule import karras_sigmas
from relay_diffusion.samplers import BlurringSampler, EDMSampler
from support import Replay, toy_denoiser

SCHEDULE = TruncatedLogNormal()
SHARP = BlurringCorruption(TruncatedLogNormal(prob_length=1.0), blur_sigma_max=0.0, block_strength=0.0)
LABELS = torch.tensor([3, 7])
LEVELS = len(BlurringSampler(SHARP, steps=12).sigmas)


def images(batch=2):
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def levels_seen(sampler):
    """Noise level of each call of the denoiser."""
    recorder = Recorder(toy_denoiser)
    sampler(recorder, images(), torch.randn_like)
    assert all(sigma.shape == (2,) for sigma in recorder.sigmas)
    return [sigma[0].item() for sigma in recorder.sigmas]


def test_churn_raises_sigma_inside_its_range_only():
    sampler = EDMSampler(steps=8, churn=2.0, churn_min=0.1, churn_max=10.0)
    begin = levels_seen(sampler)[::2]
    raised = [sigma * (1 + 2.0 / 8) if 0.1 <= sigma <= 10.0 else sigma for sigma in sampler.sigmas[:-1]]
    assert begin == pytest.approx(raised, rel=1e-12)
    assert raised != pytest.approx(sampler.sigmas[:-1])


def test_churn_raises_sigma_by_root_two_at_most():
    sampler = EDMSampler(steps=8, churn=1000.0)
    expected = [sigma * math.sqrt(2) for sigma in sampler.sigmas[:-1]]
    assert levels_seen(sampler)[::2] == pytest.approx(expected, rel=1e-12)


def test_churn_noise_scales_the_added_noise():
    sampler = EDMSampler(steps=8, churn=2.0, churn_noise=3.0)
    recorder = Recorder(toy_denoiser)
    sampler(recorder, torch.zeros(1, 3, 8, 8), torch.ones_like)
    added = math.sqrt((80.0 * 1.25) ** 2 - 80.0**2) * 3.0
    torch.testing.assert_close(recorder.states[0], torch.full((1, 3, 8, 8), added, dtype=torch.float64))


def samplers():
    return [
        EDMSampler(steps=6),
        EDMSampler(steps=6, churn=2.0, sde_scale=0.2),
        BlurringSampler(BlurringCorruption(SCHEDULE), steps=16),
        BlurringSampler(SHARP, steps=10, s_noise=0.0),
    ]


@pytest.mark.parametrize("sampler", samplers())
def test_the_result_is_the_last_estimate(sampler):
    recorder = Recorder(toy_denoiser)
    result = sampler(recorder, images(), torch.randn_like)
    torch.testing.assert_close(result, recorder.estimates[-1], atol=0, rtol=0)


@pytest.mark.parametrize("sampler", samplers())
def test_evaluations_are_the_calls_of_the_denoiser(sampler):
    assert len(levels_seen(sampler)) == sampler.evaluations


@pytest.mark.parametrize(
    ("sampler", "draws"),
    [
        (EDMSampler(steps=6), 0),
        (EDMSampler(steps=6, churn=2.0), 6),
        (EDMSampler(steps=6, sde_scale=0.2), 10),  # two for each of the five steps that end above zero
        (BlurringSampler(SHARP, steps=12, s_noise=0.0), 1),
        (BlurringSampler(SHARP, steps=12, s_noise=0.2), 2 * LEVELS - 1),
        (BlurringSampler(BlurringCorruption(SCHEDULE), steps=12, s_noise=0.2), 2 * (2 * LEVELS - 1)),
    ],
)
def test_only_noise_that_counts_is_drawn(sampler, draws):
    source = Mock(side_effect=torch.randn_like)
    sampler(toy_denoiser, images(), source)
    assert source.call_count == draws


@pytest.mark.parametrize("sampler", samplers())
def test_labels_reach_every_call(sampler):
    recorder = Recorder(toy_denoiser)
    sampler(recorder, images(), torch.randn_like, LABELS)
    assert all(labels is LABELS for labels in recorder.labels)


@pytest.mark.parametrize("sampler", samplers())
def test_the_state_is_double_precision_also_for_a_single_precision_network(sampler):
    recorder = Recorder(lambda x, sigma, labels: toy_denoiser(x, sigma, labels).float())
    result = sampler(recorder, images().float(), torch.randn_like)
    assert {state.dtype for state in [*recorder.states, *recorder.sigmas, result]} == {torch.float64}


@pytest.mark.parametrize("sampler", samplers())
def test_the_start_is_left_as_it_was(sampler):
    start = images()
    before = start.clone()
    sampler(toy_denoiser, start, torch.randn_like)
    assert torch.equal(start, before)


def test_edm_evaluates_twice_a_step_but_the_last():
    assert EDMSampler(steps=6).evaluations == 11


def test_edm_follows_the_karras_grid_to_zero():
    sampler = EDMSampler(steps=6, sigma_min=0.01, sigma_max=5.0, rho=3.0)
    assert sampler.sigmas == [*karras_sigmas(6, 0.01, 5.0, 3.0).tolist(), 0.0]


def test_relay_keeps_the_levels_below_the_truncation():
    grid = karras_sigmas(20, 0.01, 10.0, 3.0).tolist()
    sampler = BlurringSampler(SHARP, 20, 0.01, 10.0, 3.0, truncation_sigma=0.9)
    assert 2 < len(sampler.sigmas) < 20
    assert sampler.sigmas == [sigma for sigma in grid if sigma < 0.9]


def test_a_level_at_the_truncation_is_left_out():
    grid = karras_sigmas(20, 0.01, 10.0, 3.0).tolist()
    sampler = BlurringSampler(SHARP, 20, 0.01, 10.0, 3.0, truncation_sigma=grid[8])
    assert sampler.sigmas == grid[9:]


def test_relay_starts_from_its_image_with_noise_of_the_first_level():
    corruption = BlurringCorruption(SCHEDULE, block_strength=0.15)
    sampler = BlurringSampler(corruption, steps=12, s_noise=0.0)
    start, draws = images(), [images(), images()]
    recorder = Recorder(toy_denoiser)
    sampler(recorder, start, Replay(draws).randn_like)
    noise = corruption.draw_noise(start, Replay(draws).randn_like)
    torch.testing.assert_close(recorder.states[0], start + sampler.sigmas[0] * noise, atol=1e-12, rtol=0)


@pytest.mark.parametrize("s_noise", [-0.1, 1.1])
def test_relay_noise_outside_zero_and_one_is_refused(s_noise):
    with pytest.raises(ValueError, match=f"^s_noise={s_noise}: "):
        BlurringSampler(SHARP, s_noise=s_noise)


@pytest.mark.parametrize(("steps", "truncation_sigma", "left"), [(40, 0.001, 0), (2, 0.9, 1)])
def test_a_truncation_that_leaves_fewer_than_two_levels_is_refused(steps, truncation_sigma, left):
    with pytest.raises(ValueError, match=f"only {left} of {steps} noise levels"):
        BlurringSampler(SHARP, steps=steps, truncation_sigma=truncation_sigma)


def test_published_defaults():
    assert EDMSampler().sigmas == [*karras_sigmas(18, 0.002, 80.0, 7.0).tolist(), 0.0]
    relay = BlurringSampler(BlurringCorruption(SCHEDULE))
    assert relay.sigmas == [sigma for sigma in karras_sigmas(40, 0.008, 80.0, 7.0).tolist() if sigma < 0.9]
    assert relay.s_noise == 0.2


def test_two_levels_below_the_truncation_are_enough():
    grid = karras_sigmas(40, 0.008, 80.0, 7.0).tolist()
    assert BlurringSampler(SHARP, truncation_sigma=grid[-3]).sigmas == grid[-2:]


@pytest.mark.parametrize("settings", [{"churn_min": -0.1}, {"churn_max": -0.1}, {"churn_noise": math.nan}])
def test_an_invalid_churn_range_is_refused(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}="):
        EDMSampler(**settings)


def test_a_range_of_churn_may_begin_and_end_at_zero():
    sampler = EDMSampler(steps=6, churn=2.0, churn_min=0.0, churn_max=0.0)
    assert levels_seen(sampler)[::2] == pytest.approx(sampler.sigmas[:-1])


def test_churn_acts_at_both_ends_of_its_range():
    grid = karras_sigmas(8, 0.002, 80.0, 7.0).tolist()
    begin = levels_seen(EDMSampler(steps=8, churn=2.0, churn_min=grid[5], churn_max=grid[2]))[::2]
    assert begin == pytest.approx([s * (1.25 if 2 <= i <= 5 else 1) for i, s in enumerate(grid)], rel=1e-12)


@pytest.mark.parametrize("settings", [{"churn": -1.0}, {"sde_scale": -0.1}, {"sde_scale": 1.1}])
def test_impossible_edm_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}="):
        EDMSampler(**settings)


@pytest.mark.parametrize("sampler_class", [EDMSampler, lambda **grid: BlurringSampler(SHARP, **grid)])
def test_impossible_grids_are_refused(sampler_class):
    with pytest.raises(ValueError, match=r"^sigma_min=2\.0: must be below sigma_max=1\.0"):
        sampler_class(sigma_min=2.0, sigma_max=1.0)


def sampled(sampler, seeds, starts):
    noise = PerImageGenerator(seeds)
    start = noise.randn_like(starts) if isinstance(sampler, EDMSampler) else starts
    return sampler(toy_denoiser, start, noise.randn_like, torch.tensor(seeds) % 10)


@pytest.mark.parametrize(
    "sampler", [EDMSampler(6, churn=2.0, sde_scale=0.2), BlurringSampler(BlurringCorruption(SCHEDULE), 16)]
)
def test_the_same_seeds_give_the_same_images_in_any_batch(sampler):
    seeds, starts = [4, 0, 9, 2, 7], images(5)
    together = sampled(sampler, seeds, starts)
    apart = [sampled(sampler, seeds[a:b], starts[a:b]) for a, b in [(0, 3), (3, 4), (4, 5)]]
    torch.testing.assert_close(torch.cat(apart), together, atol=1e-13, rtol=0)


def test_a_start_beyond_the_schedule_is_refused():
    corruption = BlurringCorruption(TruncatedLogNormal(prob_length=0.5))
    with pytest.raises(ValueError, match="beyond the end"):
        BlurringSampler(corruption, truncation_sigma=0.9)


def test_the_first_level_decides_whether_a_start_lies_beyond_the_schedule():
    grid = [sigma for sigma in karras_sigmas(40, 0.008, 80.0, 7.0).tolist() if sigma < 0.9]
    first, second = (SCHEDULE.level(torch.tensor(sigma).double()).item() * 0.93 for sigma in grid[:2])
    corruption = BlurringCorruption(TruncatedLogNormal(prob_length=(first + second) / 2))
    with pytest.raises(ValueError, match="beyond the end"):
        BlurringSampler(corruption)


def test_a_sampler_that_stops_early_returns_its_estimate_from_there():
    """It evaluates the same levels down to the given one, and returns the estimate at that level."""
    sampler = EDMSampler(steps=9)
    stop = 0.5 * (sampler.sigmas[4] + sampler.sigmas[5])  # between two levels
    recorder = Recorder(toy_denoiser)
    result = sampler.stopping_at(stop)(recorder, images(), torch.randn_like)
    assert recorder.sigmas[-1][0].item() == pytest.approx(stop)
    torch.testing.assert_close(result, recorder.estimates[-1])
    assert [sigma[0].item() for sigma in recorder.sigmas[::2]] == pytest.approx([*sampler.sigmas[:5], stop])
    assert len(recorder.sigmas) == sampler.stopping_at(stop).evaluations == 2 * 6 - 1
    assert sampler.evaluations == 2 * 9 - 1  # the sampler itself is as it was


@pytest.mark.parametrize("level", range(1, 9))
def test_stopping_at_a_level_of_the_grid_evaluates_it_once(level):
    sampler = EDMSampler(steps=9)
    assert sampler.stopping_at(sampler.sigmas[level]).sigmas == [*sampler.sigmas[: level + 1], 0.0]


def test_stopping_just_below_a_level_evaluates_that_level_first():
    sampler = EDMSampler(steps=9)
    stop = sampler.sigmas[3] * 0.995
    assert sampler.stopping_at(stop).sigmas == [*sampler.sigmas[:4], stop, 0.0]


def test_stopping_at_the_last_level_changes_nothing():
    sampler, start = EDMSampler(steps=5), images()
    whole = sampler(toy_denoiser, start, torch.randn_like)
    torch.testing.assert_close(sampler.stopping_at(0.002)(toy_denoiser, start, torch.randn_like), whole)


def test_an_early_stop_adds_no_noise_before_its_estimate():
    sampler = EDMSampler(steps=8, churn=2.0, churn_min=0.1, churn_max=10.0)
    levels = levels_seen(sampler.stopping_at(1.0))
    assert levels[-1] == 1.0
    raised = [sigma * (1 + 2.0 / 8) if 0.1 <= sigma <= 10.0 else sigma for sigma in sampler.sigmas if sigma > 1.0]
    assert levels[:-1:2] == pytest.approx(raised)


@pytest.mark.parametrize("sigma", [0.0, 0.001, 0.00199, 79.9999999999, 80.0, 100.0])
def test_stopping_outside_the_grid_is_refused(sigma):
    with pytest.raises(ValueError, match="cannot stop"):
        EDMSampler(steps=5).stopping_at(sigma)


@pytest.mark.parametrize("sampler", [EDMSampler(steps=3), BlurringSampler(SHARP, steps=12)])
def test_noise_levels_are_given_on_the_cpu(sampler, monkeypatch):
    """Wrappers read sigma at every step, which on the device would need a synchronization."""
    monkeypatch.setattr("relay_diffusion.samplers.blurring.block_filter", lambda x, gains: x)  # noqa: ARG005
    recorder = Recorder(lambda x, sigma, labels: x)  # noqa: ARG005
    sampler(recorder, torch.empty(2, 3, 8, 8, device="meta"), lambda x: x)
    assert {sigma.device.type for sigma in recorder.sigmas} == {"cpu"}
