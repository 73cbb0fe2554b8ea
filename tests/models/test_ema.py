"""Weight averages with half-lives in images."""

import math

import pytest
import torch

from relay_diffusion.models.ema import WeightAverage


def ema_beta(batch, seen, half_life, ramp_up):
    return WeightAverage(torch.nn.Linear(1, 1), half_life, ramp_up).beta(batch, seen)


def test_a_half_life_halves_in_one_step():
    assert ema_beta(batch=1000, seen=10**9, half_life=1000, ramp_up=0.05) == pytest.approx(0.5)


@pytest.mark.parametrize("batch", [1, 8, 50, 200])
def test_a_half_life_halves_in_any_number_of_steps(batch):
    weights = [ema_beta(batch, seen, half_life=1000, ramp_up=None) for seen in range(0, 1000, batch)]
    assert math.prod(weights) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("batch", [1, 2048])
def test_the_first_batch_copies_the_weights(batch):
    assert ema_beta(batch, seen=0, half_life=500_000, ramp_up=0.05) == 0.0


def test_without_ramp_up_the_first_batch_counts_like_any_other():
    expected = 0.5 ** (64 / 1000)
    for seen in (0, 10, 10**9):
        assert ema_beta(64, seen, half_life=1000, ramp_up=None) == pytest.approx(expected, rel=1e-12)


def test_early_half_life_is_a_share_of_the_images_seen():
    assert ema_beta(batch=50, seen=1000, half_life=500_000, ramp_up=0.05) == pytest.approx(0.5)
    assert ema_beta(batch=100, seen=1000, half_life=500_000, ramp_up=0.05) == pytest.approx(0.25)


def test_ramp_up_ends_where_the_share_reaches_the_half_life():
    plain = ema_beta(10, 0, half_life=100, ramp_up=None)
    assert ema_beta(10, seen=1000, half_life=100, ramp_up=0.1) == pytest.approx(plain)
    assert ema_beta(10, seen=5000, half_life=100, ramp_up=0.1) == pytest.approx(plain)
    assert ema_beta(10, seen=999, half_life=100, ramp_up=0.1) < plain


def test_no_half_life_at_all_copies_the_weights():
    assert ema_beta(batch=1, seen=10**9, half_life=0, ramp_up=None) == 0.0


def test_the_average_moves_towards_the_weights():
    network = torch.nn.Linear(3, 2)
    average = WeightAverage(network, half_life_images=8, ramp_up=None)
    expected = {name: p.detach().clone() for name, p in network.named_parameters()}
    for step in range(3):
        torch.nn.init.normal_(network.weight)
        average.update(batch=4, seen=4 * step)
        beta = ema_beta(4, 4 * step, 8, None)
        expected = {name: torch.lerp(expected[name], p.detach(), 1 - beta) for name, p in network.named_parameters()}
    for name, value in expected.items():
        assert torch.equal(average.weights[name], value)


def test_the_weights_of_the_network_are_restored():
    network = torch.nn.Linear(3, 2)
    average = WeightAverage(network, 8, weights={"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
    raw = network.weight.detach().clone()
    with average.applied():
        assert not network.weight.any()
    assert torch.equal(network.weight, raw)
