"""FrechetDistance: the recorded values, closed forms, and sums over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.metrics import FrechetDistance
from relay_diffusion.metrics.reference import FeatureStatistics

Reference = Callable[[str], dict[str, Tensor]]
FEATURES = 12


def features(count: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(FEATURES, FEATURES, generator=generator)
    return torch.randn(count, FEATURES, generator=generator) @ mix + shift


def distance(real: Tensor, fake: Tensor) -> Tensor:
    metric = FrechetDistance(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


@pytest.mark.parametrize(("name", "key"), [("metrics_0", "fid"), ("frechet_rank_deficient", "distance")])
def test_recorded_distance(reference: Reference, name: str, key: str) -> None:
    recorded = reference(name)
    got = distance(recorded["features_real"], recorded["features_fake"])
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, recorded[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [5, 200])
def test_distance_of_a_set_to_itself_is_0(count: int) -> None:
    assert float(distance(features(count), features(count))) == pytest.approx(0, abs=1e-5)


def test_distance_is_symmetric_and_adds_the_squared_shift() -> None:
    real, fake = features(100), features(80, seed=1)
    torch.testing.assert_close(distance(real, fake), distance(fake, real))
    torch.testing.assert_close(distance(real, real + 3), torch.tensor(9.0 * FEATURES).double(), rtol=1e-5, atol=0)


def test_closed_form_of_diagonal_gaussians() -> None:
    """Diagonal covariances: |m1 - m2|^2 + |s1 - s2|^2 with standard deviations s."""
    mean, reference_deviation = torch.linspace(-1, 1, FEATURES).double(), torch.linspace(0, 3, FEATURES).double()
    metric = FrechetDistance(FEATURES, FeatureStatistics(mean, reference_deviation.square().diag(), 1000))
    # rows whose sample covariance is exactly diagonal: +a and -a along each axis
    scale = torch.linspace(0.5, 2, FEATURES, dtype=torch.float64)
    metric.update(torch.cat([scale.diag(), -scale.diag()]), real=False)
    deviation = (2 * scale.square() / (2 * FEATURES - 1)).sqrt()
    expected = mean.square().sum() + (deviation - reference_deviation).square().sum()
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-6, atol=1e-6)


def test_statistics_are_unbiased() -> None:
    metric = FrechetDistance(FEATURES)
    rows = features(30).double()
    metric.update(rows, real=False)
    mean, covariance, count = metric.statistics(real=False)
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(covariance, torch.cov(rows.T))
    assert count == 30


def test_reference_is_the_real_set_and_survives_reset() -> None:
    real, fake = features(100), features(80, 1.0, seed=1)
    expected = distance(real, fake)
    source = FrechetDistance(FEATURES)
    source.update(real, real=True)
    metric = FrechetDistance(FEATURES, source.statistics(real=True))
    metric.update(features(10, seed=2), real=False)
    metric.compute()
    metric.reset()
    metric.update(fake, real=False)
    torch.testing.assert_close(metric.compute(), expected)
    assert metric.statistics(real=True).n == 100
    with pytest.raises(ValueError, match="statistics are those of `reference`"):
        metric.update(real, real=True)


def test_batches_accumulate_and_reset_clears() -> None:
    real, fake = features(64), features(50, 0.5, seed=1)
    metric = FrechetDistance(FEATURES)
    metric.update(features(9, 5.0), real=True)
    metric.update(features(9, 7.0), real=False)
    metric.reset()
    for part in real.split(32):
        metric.update(part, real=True)
    for part in fake.split(17):
        metric.update(part, real=False)
    torch.testing.assert_close(metric.compute(), distance(real, fake))


def test_states_of_two_ranks_sum() -> None:
    real, fake = features(64), features(50, 0.5, seed=1)
    ranks = [FrechetDistance(FEATURES) for _ in range(2)]
    for rank, metric in enumerate(ranks):
        metric.update(real[rank::2], real=True)
        metric.update(fake[rank::2], real=False)
    merged = FrechetDistance(FEATURES)
    merged.update(real[:2], real=True)  # so that the metric counts as updated
    for state in ("real_sum", "real_outer", "real_count", "fake_sum", "fake_outer", "fake_count"):
        setattr(merged, state, getattr(ranks[0], state) + getattr(ranks[1], state))
    torch.testing.assert_close(merged.compute(), distance(real, fake))


def test_states_stay_float64() -> None:
    metric = torch.nn.Sequential(FrechetDistance(FEATURES)).to(torch.bfloat16).half()[0]
    metric.update(features(20).to(torch.bfloat16), real=True)
    assert metric.real_outer.dtype == torch.float64
    assert torch.nn.Sequential(metric).state_dict() == {}, "checkpoints hold no sums"


def test_errors() -> None:
    metric = FrechetDistance(FEATURES)
    with pytest.raises(ValueError, match=r"features: must be \[N,12\], not \[4, 3\]"):
        metric.update(torch.zeros(4, 3), real=True)
    metric.update(features(1), real=False)
    with pytest.raises(UserError, match="at least 2 real images"):
        metric.compute()
    metric.update(features(20), real=True)
    with pytest.raises(UserError, match="at least 2 generated images"):
        metric.compute()


def test_a_reference_of_unknown_size() -> None:
    metric = FrechetDistance(FEATURES, FeatureStatistics(torch.zeros(FEATURES), torch.eye(FEATURES), None))
    assert metric.statistics(real=True).n is None
    metric.update(features(20), real=False)
    assert metric.compute().isfinite()
