"""Evaluation: reference statistics on disk, and FID and sFID of images against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluation, FrechetDistance, Inception, InceptionFeatures, ReferenceStatistics
from relay_diffusion.metrics import evaluation as module
from relay_diffusion.metrics.evaluation import reference_statistics

POOL, CHANNELS, SIZE = 6, 7, 2
SPATIAL = CHANNELS * SIZE**2


class PixelFeatures(nn.Module):
    """In place of Inception: pixels as features."""

    def __init__(self, weights_hash: str = "pixels") -> None:
        super().__init__()
        self.weights_hash = weights_hash

    def forward(self, images: Tensor) -> InceptionFeatures:
        x = images.flatten(1).float() / 255
        spatial = x[:, POOL : POOL + SPATIAL].unflatten(1, (CHANNELS, SIZE, SIZE))
        return InceptionFeatures(x[:, :POOL], spatial, None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few features, so that eigenvalues cost nothing."""
    monkeypatch.setattr(module, "POOL_FEATURES", POOL)
    monkeypatch.setattr(module, "SPATIAL_FEATURES", SPATIAL)
    monkeypatch.setattr(module, "SPATIAL_CHANNELS", CHANNELS)
    monkeypatch.setattr(module, "SPATIAL_SIZE", SIZE)
    shapes = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}
    monkeypatch.setattr(module, "SHAPES", shapes)


def random_images(count: int, seed: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def small_reference(path: Path, images: Tensor | None = None) -> ReferenceStatistics:
    images = random_images(50, 1) if images is None else images
    return reference_statistics(images.split(16), len(images), PixelFeatures(), "set", path, "cpu")


def untouched() -> Iterator[Tensor]:
    raise AssertionError("the images were read")
    yield


def assert_same(a: ReferenceStatistics, b: ReferenceStatistics) -> None:
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        assert torch.equal(getattr(a, key), getattr(b, key)), key
        assert getattr(b, key).dtype == torch.float64
    assert (a.n, a.layout, a.source_hash) == (b.n, b.layout, b.source_hash)


@pytest.mark.usefixtures("small")
def test_reference_is_computed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "reference.npz"
    first = small_reference(path)
    assert "reference statistics: 50/50 images" in capsys.readouterr().out
    rows = random_images(50, 1).flatten(1).double() / 255
    torch.testing.assert_close(first.mu, rows[:, :POOL].mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(first.sigma_s, torch.cov(rows[:, POOL : POOL + SPATIAL].T), rtol=1e-5, atol=1e-8)
    assert (first.n, first.layout) == (50, "NCHW")
    assert [file.name for file in path.parent.iterdir()] == ["reference.npz"], "no temporary file stays"

    again = reference_statistics(untouched(), 50, PixelFeatures(), "set", path, "cpu")
    assert_same(first, again)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("weights", "source", "total"), [("x", "set", 50), ("pixels", "other", 50), ("pixels", "set", 9)]
)
def test_reference_of_something_else_is_computed_again(tmp_path: Path, weights: str, source: str, total: int) -> None:
    path = tmp_path / "reference.npz"
    old = small_reference(path)
    images = random_images(total, 2)
    new = reference_statistics([images], total, PixelFeatures(weights), source, path, "cpu")
    assert not torch.equal(old.mu, new.mu)
    assert_same(ReferenceStatistics.load(path), new)


@pytest.mark.usefixtures("small")
def test_reference_needs_the_announced_images(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    with pytest.raises(UserError, match="gave 20 images where 30 were announced"):
        reference_statistics([random_images(20, 1)], 30, PixelFeatures(), "set", path, "cpu")
    assert not path.exists()


@pytest.mark.usefixtures("small")
def test_nhwc_files_are_permuted(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    images = random_images(40, 3)
    nchw = small_reference(path, images)
    spatial = PixelFeatures()(images).spatial.permute(0, 2, 3, 1).flatten(1).double()
    arrays = dict(np.load(path)) | {
        "layout": "NHWC",
        "mu_s": spatial.mean(0).numpy(),
        "sigma_s": torch.cov(spatial.T).numpy(),
    }
    np.savez(path, **arrays)
    loaded = ReferenceStatistics.load(path)
    assert loaded.layout == "NCHW"
    torch.testing.assert_close(loaded.mu_s, nchw.mu_s)
    torch.testing.assert_close(loaded.sigma_s, nchw.sigma_s)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "CHWN"}, "layout 'CHWN'; it must be 'NCHW' or 'NHWC'"),
        ({"layout": None}, r"lacks 'layout' \(statistics of the ADM evaluator are 'NHWC'\)"),
        ({"sigma_s": None}, "lacks 'sigma_s'"),
        ({"n": None}, "lacks 'n'"),
        ({"n": 1}, "'n' must be the number of images, at least 2"),
        ({"mu": np.zeros(3)}, r"'mu' must hold finite numbers of shape \[6\], not float64 of shape \[3\]"),
        ({"mu": np.full(POOL, np.nan)}, "'mu' must hold finite numbers"),
        ({"mu": np.array(["a"] * POOL)}, "'mu' must hold finite numbers"),
        ({"mu": np.array([None] * POOL)}, "is not a readable .npz of reference statistics"),
    ],
)
def test_wrong_files(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "reference.npz"
    small_reference(path)
    arrays = {key: value for key, value in (dict(np.load(path)) | change).items() if value is not None}
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as raised:
        ReferenceStatistics.load(path)
    assert "reference.npz" in str(raised.value)


def _write_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("nothing"),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\x3f", b"\x3e")),
        _write_array,
    ],
    ids=["empty", "text", "truncated", "flipped", "npy"],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "reference.npz"
    small_reference(path)
    damage(path)
    with pytest.raises(UserError, match=r"reference\.npz is not a readable \.npz .* delete it"):
        ReferenceStatistics.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file of reference statistics at .*absent\.npz"):
        ReferenceStatistics.load(tmp_path / "absent.npz")


@pytest.mark.usefixtures("small")
def test_evaluation_feeds_both_distances(tmp_path: Path) -> None:
    reference, fake = small_reference(tmp_path / "reference.npz"), random_images(30, 4)
    evaluation = Evaluation(PixelFeatures(), reference)
    evaluation.update(random_images(5, 5))
    evaluation.compute()
    evaluation.reset()
    for batch in fake.split(8):
        evaluation.update(batch)
    result = evaluation.compute()

    real_features, fake_features = PixelFeatures()(random_images(50, 1)), PixelFeatures()(fake)
    for key, name in (("fid", "pool"), ("sfid", "spatial")):
        rows = [getattr(f, name).flatten(1) for f in (real_features, fake_features)]
        metric = FrechetDistance(rows[0].shape[1])
        metric.update(rows[0], real=True)
        metric.update(rows[1], real=False)
        assert result[key] == pytest.approx(float(metric.compute()), rel=1e-6)
    assert result["images"] == 30
    assert [type(value) for value in result.values()] == [float, float, int]

    evaluation.reset()
    evaluation.update(fake[:1])
    with pytest.raises(UserError, match="at least 2 generated images, not 1"):
        evaluation.compute()


@pytest.mark.usefixtures("small")
def test_evaluation_counts_the_images_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same images, as the gathering of states would see them."""
    reference, fake = small_reference(tmp_path / "reference.npz"), random_images(30, 4)
    evaluation = Evaluation(PixelFeatures(), reference)
    for metric in (evaluation.fid, evaluation.sfid, evaluation.images):
        monkeypatch.setattr(metric, "distributed_available_fn", lambda: True)
        monkeypatch.setattr(metric, "dist_sync_fn", lambda state, group: [state, state])  # noqa: ARG005
    evaluation.update(fake)
    result = evaluation.compute()
    whole = Evaluation(PixelFeatures(), reference)
    whole.update(fake.repeat(2, 1, 1, 1))
    assert result == pytest.approx(whole.compute())
    assert result["images"] == 60


def test_the_real_network_end_to_end(inception: Inception, tmp_path: Path) -> None:
    images = random_images(6, 1, 32)
    path = tmp_path / "reference.npz"
    reference = reference_statistics(images.split(4), 6, inception, "six", path, "cpu")
    loaded = ReferenceStatistics.load(path)
    assert_same(reference, loaded)
    evaluation = Evaluation(inception, loaded)
    evaluation.update(images)
    assert float(evaluation.fid.compute()) == pytest.approx(0, abs=1e-3)
    spatial = evaluation.sfid.statistics(real=False)  # its distance would take seconds and show nothing more
    torch.testing.assert_close(spatial.mean, reference.mu_s)
    torch.testing.assert_close(spatial.covariance, reference.sigma_s)
