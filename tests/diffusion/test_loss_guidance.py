"""Loss weight, guidance and label dropout."""

import math

import pytest
import torch

from relay_diffusion.diffusion import DenoisingLoss
from relay_diffusion.diffusion.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    GuidanceInterval,
    check_guidance,
    drop_conditions,
    with_guidance,
)

SIGMAS = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
LABELS = torch.tensor([3, 1])
X = torch.tensor([1.0, -2.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 3, 4, 4)
SIGMA = torch.tensor([0.5, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_weight_undoes_the_output_scale(sigma_data):
    c_out = SIGMAS * sigma_data / (SIGMAS**2 + sigma_data**2).sqrt()
    product = DenoisingLoss(sigma_data).weight(SIGMAS) * c_out**2
    torch.testing.assert_close(product, torch.ones_like(product), atol=1e-12, rtol=0)


def test_weight_of_sigma_equal_to_sigma_data():
    assert DenoisingLoss(0.5).weight(torch.tensor(0.5)).item() == pytest.approx(8.0)  # 2 / 0.5^2


def test_weight_is_bounded_above_only():
    free, bounded = DenoisingLoss().weight(SIGMAS), DenoisingLoss(max_weight=100.0).weight(SIGMAS)
    assert free[0] > 1e5  # unbounded by default
    assert bounded[:2].tolist() == [100.0, 100.0]
    assert torch.equal(bounded[2:], free[2:])


def test_loss_is_the_weighted_squared_error_of_each_element():
    x0, denoised = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    loss = DenoisingLoss(0.5)(denoised, x0, SIGMA)
    for i, sigma in enumerate([0.5, 2.0]):
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        torch.testing.assert_close(loss[i], weight * (denoised[i] - x0[i]) ** 2)


class LabelDenoiser:
    """D = x / (1 + sigma) + (label + 1)^2, without labels D = x / (1 + sigma); records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, labels):
        self.calls.append((x, sigma, labels))
        push = 0.0 if labels is None else (labels + 1)[:, None, None, None] ** 2
        return x / (1 + sigma[:, None, None, None]) + push


@pytest.mark.parametrize("labels", [LABELS, None])
def test_scale_one_is_the_plain_denoiser_in_one_call(labels):
    denoise = LabelDenoiser()
    guided = ClassifierFreeGuidance(denoise)(X, SIGMA, labels)
    assert len(denoise.calls) == 1
    assert denoise.calls[0][0] is X
    assert denoise.calls[0][2] is labels
    assert torch.equal(guided, LabelDenoiser()(X, SIGMA, labels))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_moves_from_no_class_towards_the_class(scale):
    guided = ClassifierFreeGuidance(LabelDenoiser(), scale)(X, SIGMA, LABELS)
    expected = X / (1 + SIGMA[:, None, None, None]) + scale * (LABELS + 1)[:, None, None, None] ** 2
    torch.testing.assert_close(guided, expected, atol=1e-12, rtol=0)


def test_guidance_is_one_forward_of_twice_the_batch():
    denoise = LabelDenoiser()
    ClassifierFreeGuidance(denoise, 2.0)(X, SIGMA, LABELS)
    ((x, sigma, labels),) = denoise.calls
    assert torch.equal(x, torch.cat([X, X]))
    assert torch.equal(sigma, torch.cat([SIGMA, SIGMA]))
    assert labels.tolist() == [3, 1, -1, -1]


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_guidance_of_any_batch(batch):
    x, sigma, labels = torch.randn(batch, 3, 4, 4).double(), torch.rand(batch).double(), torch.arange(batch)
    guided = ClassifierFreeGuidance(LabelDenoiser(), 2.0)(x, sigma, labels)
    expected = x / (1 + sigma[:, None, None, None]) + 2 * (labels + 1)[:, None, None, None] ** 2
    torch.testing.assert_close(guided, expected, atol=1e-12, rtol=0)


def test_guidance_of_images_without_a_class_changes_nothing():
    none = torch.tensor([-1, -1])
    guided = ClassifierFreeGuidance(LabelDenoiser(), 3.0)(X, SIGMA, none)
    torch.testing.assert_close(guided, LabelDenoiser()(X, SIGMA, None), atol=1e-12, rtol=0)


def test_guidance_without_labels_is_refused():
    with pytest.raises(ValueError, match="guidance needs class labels"):
        ClassifierFreeGuidance(LabelDenoiser(), 2.0)(X, SIGMA, None)


def test_autoguidance_moves_away_from_the_guide():
    denoise, guide = LabelDenoiser(), lambda x, sigma, labels: 0.5 * x + labels[:, None, None, None]  # noqa: ARG005
    strong, weak = denoise(X, SIGMA, LABELS), guide(X, SIGMA, LABELS)
    for scale in (0.0, 1.0, 2.5):
        guided = AutoGuidance(denoise, guide, scale)(X, SIGMA, LABELS)
        torch.testing.assert_close(guided, (1 - scale) * weak + scale * strong, atol=1e-12, rtol=0)


def test_autoguidance_of_scale_one_does_not_evaluate_the_guide():
    def guide(*_):
        raise AssertionError

    assert torch.equal(AutoGuidance(LabelDenoiser(), guide)(X, SIGMA, None), LabelDenoiser()(X, SIGMA, None))


@pytest.mark.parametrize(
    ("low", "high", "guided"),
    [(0.0, math.inf, [1, 1]), (0.0, 0.4, [0, 0]), (9.0, 10.0, [0, 0]), (0.5, 0.5, [1, 0]), (1.0, 2.0, [0, 1])],
)
def test_guidance_is_applied_inside_its_interval_only(low, high, guided):
    calls = []

    def stronger(x, sigma, labels):
        calls.append(sigma)
        return ClassifierFreeGuidance(LabelDenoiser(), 3.0)(x, sigma, labels)

    result = GuidanceInterval(LabelDenoiser(), stronger, low, high)(X, SIGMA, LABELS)
    plain = LabelDenoiser()(X, SIGMA, LABELS)
    inside = ClassifierFreeGuidance(LabelDenoiser(), 3.0)(X, SIGMA, LABELS)
    for i, here in enumerate(guided):
        assert torch.equal(result[i], inside[i] if here else plain[i])
    assert len(calls) == bool(sum(guided))  # no evaluation outside the interval


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (2.0, 1.0)])
def test_an_empty_interval_is_refused(low, high):
    with pytest.raises(ValueError, match="interval"):
        GuidanceInterval(LabelDenoiser(), LabelDenoiser(), low, high)


def test_no_label_is_dropped_with_probability_zero():
    labels = torch.arange(1000)
    assert torch.equal(drop_conditions(labels, None, 0.0)[0], labels)


def test_every_label_is_dropped_with_probability_one():
    assert (drop_conditions(torch.arange(1000), None, 1.0)[0] == -1).all()


def test_labels_are_dropped_at_the_rate_asked_for():
    labels = torch.arange(20_000)
    dropped, _ = drop_conditions(labels, None, 0.1)
    kept = dropped >= 0
    assert torch.equal(dropped[kept], labels[kept])
    assert (~kept).double().mean().item() == pytest.approx(0.1, abs=0.011)  # five standard errors


def test_dropping_leaves_its_argument_alone():
    labels = torch.arange(10)
    drop_conditions(labels, None, 1.0)
    assert labels.tolist() == list(range(10))


def test_an_interval_without_ends_holds_every_noise_level():
    whole = GuidanceInterval(lambda *_: "plain", lambda *_: "guided")
    for sigma in (1e-6, 0.002, 80.0, 1e6):
        assert whole(X, torch.tensor([sigma, sigma]), LABELS) == "guided"


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, "2", None])
def test_an_invalid_guidance_scale_is_refused(scale):
    with pytest.raises(ValueError, match=r"^guidance_scale="):
        check_guidance(scale, None)


@pytest.mark.parametrize(
    "interval", [["a", "b"], [math.nan, 1.0], [0.0, None], [], [1.0], [0.0, 1.0, 2.0], [2.0, 1.0], [-1.0, 1.0], 3.0]
)
def test_an_invalid_guidance_interval_is_refused(interval):
    with pytest.raises(ValueError, match=r"^guidance_interval="):
        check_guidance(2.0, interval)


def test_guidance_intervals_may_start_at_zero_and_contain_one_level():
    for interval in (None, [0.0, 1.0], [1.0, 1.0]):
        check_guidance(2.0, interval)


def test_scale_one_is_the_plain_denoiser_itself():
    def plain(*_):
        raise AssertionError

    assert with_guidance(plain, 1.0) is plain
    assert isinstance(with_guidance(plain, 2.0), ClassifierFreeGuidance)
    assert isinstance(with_guidance(plain, 2.0, [0.0, 1.0]), GuidanceInterval)
    with pytest.raises(ValueError, match="network is unconditional"):
        with_guidance(plain, 2.0, conditional=False)
    assert with_guidance(plain, 1.0, [0.0, 1.0]) is plain  # a stage may have been trained with an interval
    with pytest.raises(ValueError, match="guidance_scale=1 disables guidance: remove guide"):
        with_guidance(plain, 1.0, guide=plain)


@pytest.mark.parametrize("settings", [{"sigma_data": 0.0}, {"sigma_data": math.inf}, {"max_weight": -1.0}])
def test_impossible_weights_are_refused(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}="):
        DenoisingLoss(**settings)
