"""Evaluator: one Inception pass for all metrics, skipped metrics, warnings, description."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from fake_inception import PixelFeatures, pixel_reference, random_images, write_adm
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.npz import Npz, write_adm_samples
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import (
    Evaluator,
    FeatureMetric,
    FIDMetric,
    FrechetDistance,
    ImageMetric,
    Inception,
    InceptionFeatures,
    InceptionScore,
    InceptionScoreMetric,
    KIDMetric,
    PrecisionRecallMetric,
    Reference,
    ReferenceSource,
    SFIDMetric,
)
from relay_diffusion.metrics.kid import kernel_distance
from relay_diffusion.metrics.precision_recall import precision_recall
from relay_diffusion.metrics.protocol import adm, edm
from relay_diffusion.metrics.reference import FeatureStatistics, read_reference
from support import PROJECT


def all_metrics(split_size: int = 7) -> dict[str, ImageMetric]:
    return {
        "fid": FIDMetric(),
        "sfid": SFIDMetric(),
        "inception_score": InceptionScoreMetric(split_size),
        "precision_recall": PrecisionRecallMetric(),
        "kid": KIDMetric(),
    }


@pytest.fixture
def reference() -> Reference:
    return replace(pixel_reference(random_images(50, 1)), path=Path("set.zip"))


def feed(evaluation: Evaluator, images: Tensor, order: Sequence[int] | Tensor, batch: int = 8) -> None:
    for at in torch.as_tensor(order).split(batch):
        evaluation.update(images[at], at)


def test_every_metric_equals_its_formula(reference: Reference) -> None:
    inception, fake = PixelFeatures(), random_images(30, 4)
    evaluation = Evaluator(inception, reference, all_metrics())
    feed(evaluation, random_images(5, 5), range(5))
    evaluation.compute()
    evaluation.reset()
    inception.seen = 0
    feed(evaluation, fake, range(30))
    result = evaluation.compute()
    assert inception.seen == 30, "one pass for all"

    real, generated = PixelFeatures()(random_images(50, 1)), PixelFeatures()(fake)
    expected = {}
    for key, name in (("fid", "pool"), ("sfid", "spatial")):
        metric = FrechetDistance(getattr(real, name)[0].numel())
        metric.update(getattr(real, name).flatten(1), real=True)
        metric.update(getattr(generated, name).flatten(1), real=False)
        expected[key] = float(metric.compute())
    score = InceptionScore(7)
    score.update(generated.logits)
    expected["inception_score"] = float(score.compute())
    expected |= {key: float(value) for key, value in precision_recall(real.pool, generated.pool, 3)._asdict().items()}
    expected["kid"] = float(kernel_distance(real.pool, generated.pool))
    assert result == pytest.approx(expected | {"images": 30}, rel=1e-6)
    assert list(result) == ["fid", "sfid", "inception_score", "precision", "recall", "kid", "images"]
    assert [type(value) for value in result.values()] == [*[float] * 6, int]
    assert evaluation.skipped == {}


@pytest.mark.parametrize("batch", [1, 4, 30])
def test_results_do_not_depend_on_batches_and_order(reference: Reference, batch: int) -> None:
    fake = random_images(30, 4)
    plain, mixed = (Evaluator(PixelFeatures(), reference, all_metrics()) for _ in range(2))
    feed(plain, fake, range(30))
    feed(mixed, fake, torch.randperm(30), batch)
    assert mixed.compute() == pytest.approx(plain.compute(), rel=1e-10)


def test_features_are_kept_only_if_a_metric_needs_them(reference: Reference) -> None:
    def state_bytes(evaluation: Evaluator) -> int:
        total = 0
        for metric in (module for module in evaluation.modules() if isinstance(module, Metric)):
            for name in metric.metric_state:
                state = getattr(metric, name)
                parts = state if isinstance(state, list) else [state]
                total += sum(part.untyped_storage().nbytes() for part in parts)
        return total

    everything = all_metrics(split_size=10_000)
    for names, grows in (({"fid", "sfid", "inception_score"}, 0), ({"precision_recall", "kid"}, 6 * 4)):
        evaluation = Evaluator(PixelFeatures(), reference, {name: everything[name] for name in names})
        feed(evaluation, random_images(8, 2), range(8))
        before = state_bytes(evaluation)
        assert before > 0
        feed(evaluation, random_images(408, 2), range(8, 408))
        assert state_bytes(evaluation) - before == (grows + 8) * 400, "features are kept once, a position is 8 bytes"


def test_skipped_metrics_and_reasons(reference: Reference) -> None:
    poor = replace(reference, spatial=None, features=None)
    evaluation = Evaluator(PixelFeatures(has_classes=False), poor, all_metrics())
    none = "the reference set.zip holds statistics only, no images"
    expected = {
        "sfid": "the reference set.zip holds no spatial statistics",
        "inception_score": "these Inception weights have no class layer; "
        "set metrics.evaluator.inception.weights to a pt_inception-2015-12-05-*.pth file",
        "precision_recall": none,
        "kid": none,
    }
    assert evaluation.skipped == expected
    assert list(evaluation.metrics) == ["fid"]
    feed(evaluation, random_images(9, 4), range(9))
    assert list(evaluation.compute()) == ["fid", "images"]
    assert evaluation.skipped == expected
    assert evaluation.describe()["skipped"] == expected

    assert reference.features is not None
    few = Evaluator(PixelFeatures(), replace(reference, features=reference.features[:3]), all_metrics())
    assert few.skipped == {
        "precision_recall": "needs 4 reference images, and set.zip has 3",
    }
    one = Evaluator(PixelFeatures(), replace(reference, features=reference.features[:1]), all_metrics())
    assert one.skipped["kid"] == "needs 2 reference images, and set.zip has 1"


def test_too_few_images_skip_only_metrics_that_need_more(reference: Reference) -> None:
    evaluation = Evaluator(PixelFeatures(), reference, all_metrics())
    assert evaluation.compute() == {"images": 0}
    assert evaluation.skipped == {
        "fid": "a Fréchet distance needs at least 2 generated images, not 0; give more of them",
        "sfid": "a Fréchet distance needs at least 2 generated images, not 0; give more of them",
        "inception_score": "the Inception Score needs at least one generated image",
        "precision_recall": "precision and recall need more than 3 generated images, not 0; give more",
        "kid": "KID needs at least 2 generated images, not 0; give more of them",
    }
    feed(evaluation, random_images(3, 4), range(3))
    assert list(evaluation.compute()) == ["fid", "sfid", "inception_score", "kid", "images"]
    assert list(evaluation.skipped) == ["precision_recall"]
    evaluation.reset()
    assert evaluation.skipped == {}


@pytest.mark.parametrize(
    "positions",
    [[0, 1, 1], [0, 1, 3], [1, 2, 3], [0, 0, 3], [-1, 1, 3], [1, 1, 2, 2, 3, 6, 6]],  # the last: sums as of 0..6
)
def test_missing_or_repeated_positions_raise(reference: Reference, positions: list[int]) -> None:
    evaluation, count = Evaluator(PixelFeatures(), reference, all_metrics()), len(positions)
    evaluation.update(random_images(count, 4), torch.tensor(positions))
    with pytest.raises(ValueError, match=rf"the positions of {count} images are not 0\.\.{count - 1}, each once"):
        evaluation.compute()


def test_a_singular_covariance_is_reported(reference: Reference) -> None:
    """FID has 6 features, sFID 28; the rank is n - 1."""
    few = replace(reference, pool=reference.pool._replace(n=6))
    for generated, expected in (
        (6, ["FID is unreliable with 6 generated and 6 reference images", "sFID is unreliable with 6 generated "]),
        (7, ["FID is unreliable with 6 reference images: 6 features need at least 7;", "sFID is unreliable with 7 "]),
        (29, ["FID is unreliable with 6 reference images"]),
    ):
        evaluation = Evaluator(PixelFeatures(), few, {"fid": FIDMetric(), "sfid": SFIDMetric()})
        feed(evaluation, random_images(generated, 4), range(generated))
        evaluation.compute()
        assert len(evaluation.warnings) == len(expected)
        for line, start in zip(evaluation.warnings, expected, strict=True):
            assert line.startswith(start)
            assert "use 10,000 or more" in line
        evaluation.reset()
        assert evaluation.warnings == []
    unknown = replace(reference, pool=reference.pool._replace(n=None))
    evaluation = Evaluator(PixelFeatures(), unknown, {"fid": FIDMetric()})
    feed(evaluation, random_images(7, 4), range(7))
    evaluation.compute()
    assert evaluation.warnings == []


def test_2049_images_give_a_covariance_of_full_rank() -> None:
    metric = FIDMetric()
    pool = FeatureStatistics(torch.zeros(2048), torch.zeros(2048, 2048), None)
    metric.prepare(Reference(pool, None), PixelFeatures())
    assert metric.warnings(2049) == []
    (line,) = metric.warnings(2048)
    assert "2,048 features need at least 2,049" in line


def test_the_device_of_inception_may_differ_from_that_of_the_states(reference: Reference) -> None:
    """States stay on the CPU on Apple GPUs, while Inception takes its images from its own device."""

    class Elsewhere(PixelFeatures):
        device = torch.device("meta")

        def forward(self, images: Tensor) -> InceptionFeatures:
            assert images.device == self.device
            return super().forward(torch.zeros(images.shape, dtype=torch.uint8))

    assert Evaluator(Elsewhere(), reference, all_metrics()).compute() == {"images": 0}


def test_invalid_calls(reference: Reference) -> None:
    evaluation = Evaluator(PixelFeatures(), reference, all_metrics())
    for positions in (torch.arange(2), torch.arange(3).float(), torch.arange(3)[:, None]):
        with pytest.raises(ValueError, match="positions: need 3 int64 values"):
            evaluation.update(random_images(3, 4), positions)
    with pytest.raises(ValueError, match=r"two have the same name \(fid, fid\)"):
        Evaluator(PixelFeatures(), reference, {"a": FIDMetric(), "b": FIDMetric()})


class PlainMean(FeatureMetric):
    names = ("mean",)

    def compute(self, features: Tensor) -> dict[str, float]:
        return {"mean": features.mean()}  # type: ignore[dict-item]


class WithoutFeatures(PlainMean):
    keeps_features = False


class Misnamed(PlainMean):
    names = ("average",)


class NoMapping(PlainMean):
    def compute(self, features: Tensor) -> float:  # type: ignore[override]
        return float(features.mean())


class Failing(PlainMean):
    names = ("failed",)

    def compute(self, features: Tensor) -> dict[str, float]:  # noqa: ARG002
        raise ValueError("no\nnumber")


class Wide(PlainMean):
    def compute(self, features: Tensor, positions: Tensor) -> dict[str, float]:  # type: ignore[override]  # noqa: ARG002
        return {}


class Narrow(PlainMean):
    def update(self, features: InceptionFeatures) -> None:  # type: ignore[override]
        pass


class Unready(PlainMean):
    def prepare(self, reference: Reference) -> None:  # type: ignore[override]
        pass


class Unwarned(PlainMean):
    def warnings(self) -> list[str]:  # type: ignore[override]
        return []


class Undescribed(PlainMean):
    def describe(self, more: int) -> dict[str, int]:  # type: ignore[override]
        return {"more": more}


class Nameless(ImageMetric):
    def prepare(self, reference: Reference, inception: Inception) -> None:
        pass

    def compute(self, features: Tensor) -> dict[str, float]:  # noqa: ARG002
        return {}


def test_a_tensor_as_result_is_a_number(reference: Reference) -> None:
    evaluation = Evaluator(PixelFeatures(), reference, {"failing": Failing(), "mean": PlainMean()})
    feed(evaluation, random_images(9, 4), range(9))
    result = evaluation.compute()
    assert list(result) == ["mean", "images"]
    assert type(result["mean"]) is float
    assert evaluation.skipped == {"failing": "no number"}


def test_a_metric_names_its_results(reference: Reference) -> None:
    for metric in (Nameless(), torch.nn.Identity()):
        with pytest.raises(UserError, match=r"^metrics\.evaluator\.metrics\.a: .* must be a subclass .* names ="):
            Evaluator(PixelFeatures(), reference, {"a": metric})  # type: ignore[dict-item]
    for metric, found in ((Misnamed(), r"mean, .*\(average\)"), (NoMapping(), "a float; .* with the keys mean$")):
        evaluation = Evaluator(PixelFeatures(), reference, {"a": metric})
        feed(evaluation, random_images(9, 4), range(9))
        with pytest.raises(UserError, match=rf"^metrics\.evaluator\.metrics\.a: compute returned {found}"):
            evaluation.compute()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Wide(), r"Wide\.compute must take the arguments \(features\): missing a required argument: 'positions'"),
        (
            Unready(),
            r"Unready\.prepare must take the arguments \(reference, inception\): too many positional arguments",
        ),
        (Unwarned(), r"Unwarned\.warnings must take the arguments \(images\): too many positional arguments"),
        (Undescribed(), r"Undescribed\.describe must take the arguments \(\): missing a required argument: 'more'"),
        (Narrow(), r"Narrow\.update must take the arguments \(features, positions\): too many positional arguments"),
    ],
)
def test_a_method_with_other_arguments_is_refused(reference: Reference, metric: ImageMetric, message: str) -> None:
    with pytest.raises(UserError, match=rf"^metrics\.evaluator\.metrics\.a: {message}$"):
        Evaluator(PixelFeatures(), reference, {"a": metric})


@pytest.mark.parametrize("others", [{}, {"kid": KIDMetric()}])
def test_features_need_keeps_features(reference: Reference, others: dict[str, ImageMetric]) -> None:
    evaluation = Evaluator(PixelFeatures(), reference, {"a": WithoutFeatures(), **others})
    feed(evaluation, random_images(9, 4), range(9))
    with pytest.raises(TypeError, match="set keeps_features = True"):
        evaluation.compute()


def test_protocol_checks_and_description(reference: Reference) -> None:
    evaluation = Evaluator(PixelFeatures(), reference, all_metrics(split_size=5000), adm())
    record = json.loads(json.dumps(evaluation.describe()))
    assert record["protocol"]["name"] == "adm"
    assert (record["protocol"]["rounding"], record["protocol"]["spatial_layout"]) == ("floor", "NHWC")
    assert record["metrics"]["inception_score"] == {"split_size": 5000}
    assert record["metrics"]["precision_recall"] == {"nearest_k": 3}
    assert record["inception_sha256"] == "pixels"
    assert record["reference"]["path"] == "set.zip"
    assert (record["reference"]["images"], record["reference"]["features_kept"]) == (50, 50)
    assert edm().describe()["rounding"] == "nearest"
    Evaluator(PixelFeatures(), reference, all_metrics(split_size=7), edm())  # which does not define it
    with pytest.raises(
        UserError, match=r"^metrics\.evaluator\.metrics\.inception_score\.split_size=7: the protocol adm uses 5000"
    ):
        Evaluator(PixelFeatures(), reference, all_metrics(split_size=7), adm())
    with pytest.raises(UserError, match=r"^metrics\.evaluator\.metrics\.pr\.nearest_k=5: the protocol adm uses 3"):
        Evaluator(PixelFeatures(), reference, {"pr": PrecisionRecallMetric(5)}, adm())


@pytest.mark.slow
def test_evaluation_with_the_real_network(inception: Inception, tmp_path: Path) -> None:
    """Compare a set with itself through files of this project and ADM."""
    images = torch.cat(list(open_image_set(PROJECT / "demo" / "emoji-64.zip", "set").batches(9, range(0, 2700, 300))))
    samples = tmp_path / "samples.npz"
    write_adm_samples(samples, [images], 9, (64, 64))
    reference = ReferenceSource(samples, tmp_path / "cache").load(inception, "cpu")
    own, adm_file = tmp_path / "own.npz", tmp_path / "adm.npz"
    reference.save(own)
    write_adm(reference, adm_file)
    assert reference.spatial is not None
    for path in (own, adm_file):
        loaded = read_reference(Npz(path, "set"))
        assert loaded.spatial is not None
        assert torch.equal(loaded.spatial.mean, reference.spatial.mean)
        assert torch.equal(loaded.pool.covariance, reference.pool.covariance)
    own_arrays, adm_arrays = dict(np.load(own)), dict(np.load(adm_file))
    for arrays, other, order in ((own_arrays, adm_arrays, "NCHW"), (adm_arrays, own_arrays, "NHWC")):
        np.savez(tmp_path / "swapped.npz", **arrays | {"mu_s": other["mu_s"], "sigma_s": other["sigma_s"]})
        with pytest.raises(UserError, match=f"swapped.npz: its spatial statistics .* should be in {order} order"):
            read_reference(Npz(tmp_path / "swapped.npz", "set"))

    metrics = {"fid": FIDMetric(), "precision_recall": PrecisionRecallMetric(), "kid": KIDMetric()}
    evaluation = Evaluator(inception, reference, metrics)
    sfid = SFIDMetric()
    sfid.prepare(reference, inception)
    feed(evaluation, images, range(9), 5)
    result = evaluation.compute()
    assert result["fid"] == pytest.approx(0, abs=1e-3)
    assert (result["precision"], result["recall"], result["images"]) == (1, 1, 9)
    assert result["kid"] < 0, "see kernel_distance"
    sfid.update(inception(images), torch.arange(9))
    spatial = sfid.distance.statistics(real=False)  # its distance would take seconds and show nothing more
    torch.testing.assert_close(spatial.mean, reference.spatial.mean)
    torch.testing.assert_close(spatial.covariance, reference.spatial.covariance)
