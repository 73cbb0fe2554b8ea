"""Precision, recall and Inception Score: recorded numbers and closed forms."""

import pytest
import torch

from relay_diffusion.errors import UserError
from relay_diffusion.metrics import InceptionScore, PrecisionRecall


def test_recorded_precision_and_recall(reference):
    v = reference("metrics_0")
    metric = PrecisionRecall(int(v["nearest_k"]))
    for part in v["features_real"].split(70):
        metric.update(part, real=True)
    metric.update(v["features_fake"], real=False)
    result = metric.compute()
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
    metric = PrecisionRecall(2)
    metric.update(near, real=True)
    metric.update(near, real=False)
    assert metric.compute() == (1.0, 1.0)
    metric.reset()
    metric.update(near, real=True)
    metric.update(far, real=False)
    assert metric.compute() == (0.0, 0.0)


def test_precision_is_of_the_generated_images():
    """Generated: half on the real points, half far away; every real point is covered."""
    real = torch.randn(20, 4)
    metric = PrecisionRecall(3)
    metric.update(real, real=True)
    metric.update(torch.cat([real, torch.randn(20, 4) + 1000]), real=False)
    assert metric.compute() == (0.5, 1.0)


def test_scores_of_certain_and_of_uninformed_classes():
    certain, uninformed = InceptionScore(), InceptionScore()
    certain.update(1e4 * torch.eye(5))
    uninformed.update(torch.zeros(7, 5))
    uninformed.update(1e4 * torch.eye(5), real=True)  # does not count
    assert certain.compute().item() == pytest.approx(5)
    assert uninformed.compute().item() == pytest.approx(1)


def test_too_few_images():
    metric = PrecisionRecall(3)
    metric.update(torch.randn(3, 2), real=True)
    with pytest.raises(UserError, match="more than 3 real"):
        metric.compute()
    score = InceptionScore()
    score.update(torch.zeros(2, 3), real=True)
    with pytest.raises(UserError, match="at least one"):
        score.compute()
