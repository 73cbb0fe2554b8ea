"""Precision, recall and Inception Score: recorded numbers and closed forms."""

import math

import pytest
import torch

from relay_diffusion.errors import UserError
from relay_diffusion.metrics import InceptionScore, PrecisionRecallMetric
from relay_diffusion.metrics.base import FeatureStore
from relay_diffusion.metrics.precision_recall import precision_recall


def test_recorded_precision_and_recall(reference):
    v = reference("metrics_0")
    result = precision_recall(v["features_real"], v["features_fake"], int(v["nearest_k"]))
    assert result.precision.item() == pytest.approx(v["precision"].item(), rel=1e-6)
    assert result.recall.item() == pytest.approx(v["recall"].item(), rel=1e-6)


def test_recorded_inception_score(reference):
    v = reference("metrics_0")
    metric = InceptionScore(int(v["is_split_size"]))
    for part in v["is_logits"].split(130):
        metric.update(part)
    assert metric.compute().item() == pytest.approx(v["inception_score"].item(), rel=1e-6)


def test_a_set_covers_itself_and_not_a_distant_one():
    near, far = torch.randn(20, 4), torch.randn(30, 4) + 1000
    assert precision_recall(near, near, 2) == (1.0, 1.0)
    assert precision_recall(near, far, 2) == (0.0, 0.0)


def test_precision_is_the_share_of_generated_images():
    """Half of the generated points are real points, half are far away."""
    real = torch.randn(20, 4)
    assert precision_recall(real, torch.cat([real, torch.randn(20, 4) + 1000]), 3) == (0.5, 1.0)


def test_scores_of_certain_and_of_uninformed_classes():
    certain, uninformed = InceptionScore(), InceptionScore()
    certain.update(1e4 * torch.eye(5))
    uninformed.update(torch.zeros(7, 5))
    uninformed.update(1e4 * torch.eye(5), real=True)  # does not count
    assert certain.compute().item() == pytest.approx(5)
    assert uninformed.compute().item() == pytest.approx(1)


def test_too_few_images():
    with pytest.raises(UserError, match="more than 3 real"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2), 3)
    with pytest.raises(UserError, match="more than 3 generated"):
        precision_recall(torch.randn(9, 2), torch.randn(3, 2), 3)
    score = InceptionScore()
    score.update(torch.zeros(2, 3), real=True)
    with pytest.raises(UserError, match="at least one"):
        score.compute()


def test_splits_are_by_position_for_any_batches_and_order():
    logits = 3 * torch.randn(23, 6)
    parts = [part.double().log_softmax(1) for part in logits.split(5)]  # the last one is smaller and counts as much
    divergences = [(p.exp() * (p - p.exp().mean(0).log())).sum(1).mean() for p in parts]
    expected = sum(math.exp(d) for d in divergences) / 5
    assert abs(expected - score_of(logits, 23)) > 0.1, "the splits matter"
    in_order = InceptionScore(5)
    for part in logits.split(4):
        in_order.update(part)
    assert in_order.compute().item() == pytest.approx(expected, rel=1e-12)
    for batch in (1, 3, 23):
        order = torch.randperm(23)
        metric = InceptionScore(5)
        for at in order.split(batch):
            metric.update(logits[at], positions=at)
        assert metric.compute().item() == pytest.approx(expected, rel=1e-12)


def score_of(logits, split_size):
    metric = InceptionScore(split_size)
    metric.update(logits)
    return metric.compute().item()


def test_impossible_class_does_not_change_the_score():
    """Its probability is 0 in float64, and 0 log 0 is 0."""
    logits = torch.tensor([[0.0, 0.0, -2000.0], [5.0, 0.0, -3000.0]])
    assert score_of(logits, 2) == pytest.approx(score_of(logits[:, :2], 2))


def test_inception_score_keeps_sums_of_splits():
    metric = InceptionScore(50)
    metric.update(torch.randn(100, 6))
    before = [part.shape for part in (*metric.sums, *metric.splits)]
    for at in range(100):
        metric.update(torch.randn(9, 6), positions=torch.full((9,), at))
    assert [part.shape for part in (*metric.sums, *metric.splits)] == before == [(2, 8), (2,)]
    metric.reset()
    metric.update(torch.zeros(4, 6))
    assert metric.compute().item() == pytest.approx(1)


def test_invalid_settings():
    with pytest.raises(UserError, match="split_size=0"):
        InceptionScore(0)
    with pytest.raises(UserError, match="nearest_k=0"):
        PrecisionRecallMetric(0)


def test_states_keep_their_dtype_under_another_precision():
    module = torch.nn.ModuleList([InceptionScore(), FeatureStore(keeps_features=True)])
    module[0].update(torch.randn(3, 4))
    module[1].update(torch.randn(3, 4), torch.arange(3))
    module.to(torch.bfloat16).half()
    assert module[0].sums[0].dtype == torch.float64
    assert module[1].features[0].dtype == torch.float32
