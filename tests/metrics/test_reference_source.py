"""Sources of references: computed from images, cached, or read from statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fake_inception import POOL, PixelFeatures, pixel_reference, random_images, write_adm, write_edm
from relay_diffusion.data.image_sets import image_tensor
from relay_diffusion.data.npz import write_adm_samples
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Reference, ReferenceSource
from relay_diffusion.metrics.reference_source import _choice
from relay_diffusion.utils.pictures import pil_image

pytestmark = pytest.mark.usefixtures("small")


def write_zip(path: Path, images: Tensor) -> Path:
    with image_zip(path) as archive:
        for index, image in enumerate(images):
            archive.add(f"train/{index:03d}.png", Image.fromarray(image.permute(1, 2, 0).numpy()))
    return path


def write_folder(path: Path, images: Tensor) -> Path:
    path.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{index:03d}.png")
    return path


def write_npz(path: Path, images: Tensor) -> Path:
    write_adm_samples(path, [images], len(images), (images.shape[2], images.shape[3]))
    return path


def load(path: Path, inception: PixelFeatures | None = None, **options: object) -> Reference:
    source = ReferenceSource(path, cache=path.parent / "cache", **options)
    return source.load(inception or PixelFeatures(), "cpu", batch_size=16)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_the_reference_has_the_channels_of_the_samples(tmp_path: Path, channels: int, mode: str) -> None:
    images = random_images(20, 1)
    path = write_zip(tmp_path / "set.zip", images)
    expected = torch.stack([image_tensor(pil_image(image).convert(mode)) for image in images])
    found = load(path, channels=channels)
    assert_close(found, pixel_reference(expected))
    assert found.source_hash != load(path).source_hash


def assert_close(got: Reference, expected: Reference) -> None:
    torch.testing.assert_close(got.pool[:2], expected.pool[:2], rtol=1e-6, atol=1e-8)
    assert got.spatial is not None
    torch.testing.assert_close(got.spatial[:2], expected.spatial[:2], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("write", "name", "kind"),
    [(write_zip, "set.zip", "zip"), (write_folder, "set", "folder"), (write_npz, "set.npz", "adm_samples")],
)
def test_each_reference_image_passes_inception_once(
    write: object, name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = random_images(50, 1)
    path = write(tmp_path / name, images)
    inception = PixelFeatures()
    first = load(path, inception)
    assert "reference statistics: 50/50 images" in capsys.readouterr().out
    assert_close(first, pixel_reference(images))
    assert torch.equal(first.features, PixelFeatures()(images).pool)
    assert (first.pool.n, first.kind, first.layout, first.path) == (50, kind, "NCHW", path)
    assert inception.seen == 50
    again = load(path, inception)
    assert inception.seen == 50
    assert again.describe() == first.describe()
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.spatial.covariance, first.spatial.covariance)
    (cached,) = (tmp_path / "cache").iterdir()
    assert load(cached).describe() == first.describe() | {"path": str(cached), "kind": "statistics"}


def test_cache_is_keyed_by_images_options_and_network(tmp_path: Path) -> None:
    images = random_images(20, 1, 16)
    path = write_zip(tmp_path / "set.zip", images)
    hashes = {load(path).source_hash}
    for options in ({"resolution": (8, 8)}, {"max_features": 5}, {"inception": PixelFeatures("others")}):
        hashes.add(load(path, **options).source_hash)
    hashes.add(load(write_zip(tmp_path / "set.zip", random_images(20, 2, 16))).source_hash)
    assert len(hashes) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_features_of_a_fixed_random_subset(tmp_path: Path) -> None:
    images = random_images(50, 1)
    path = write_zip(tmp_path / "set.zip", images)
    chosen = _choice(50, 12)
    assert len(set(chosen.tolist())) == 12
    assert chosen.tolist() == sorted(chosen.tolist()) != list(range(12))
    assert max(chosen) >= 40, "from the whole set"
    some = load(path, max_features=12)
    assert torch.equal(some.features, PixelFeatures()(images[chosen]).pool)
    assert_close(some, pixel_reference(images))
    assert some.describe()["features_kept"] == 12
    assert load(path, max_features=0).features is None
    assert len(load(path, max_features=50).features) == 50


def test_edm_statistics_are_not_cached(tmp_path: Path) -> None:
    expected = pixel_reference(random_images(30, 1))
    path = tmp_path / "edm.npz"
    write_edm(expected, path)
    inception = PixelFeatures()
    got = load(path, inception)
    assert torch.equal(got.pool.covariance, expected.pool.covariance)
    assert (got.spatial, got.features, got.pool.n, got.kind) == (None, None, None, "edm_statistics")
    assert len(got.source_hash) == 64
    assert inception.seen == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("most", [10_000, 8, 0])
def test_adm_reference_keeps_its_statistics(most: int, tmp_path: Path) -> None:
    """The statistics come from more images than the file has."""
    expected, images = pixel_reference(random_images(90, 1)), random_images(20, 2)
    path = tmp_path / "adm.npz"
    write_adm(expected, path)
    np.savez_compressed(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **dict(np.load(path)))
    inception = PixelFeatures()
    got = [load(path, inception, max_features=most, resolution=(4, 4)) for _ in range(2)]
    kept = min(most, 20)
    assert inception.seen == kept
    for reference in got:
        assert torch.equal(reference.pool.mean, expected.pool.mean)
        assert torch.equal(reference.spatial.covariance, expected.spatial.covariance)
        assert (reference.pool.n, reference.kind, reference.layout) == (None, "adm_reference", "NHWC")
        assert reference.describe()["features_kept"] == kept
        if most:
            assert torch.equal(reference.features, PixelFeatures()(images[_choice(20, most)]).pool)


def test_own_file_with_fewer_features(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    expected = pixel_reference(random_images(30, 1))
    expected.save(path)
    assert torch.equal(load(path).features, expected.features)
    assert torch.equal(load(path, max_features=4).features, expected.features[_choice(30, 4)])
    assert load(path, max_features=0).features is None
    assert load(path).source_hash != "", "a hash of the content, as the file has no source_hash"


def test_invalid_paths_raise_in_the_constructor(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(POOL))
    np.savez(tmp_path / "batch.npz", np.zeros((2, 8, 8), np.uint8))
    write_zip(tmp_path / "set.zip", random_images(3, 1))
    for name, options, message in (
        ("absent", {}, r"^reference=.*absent: no such file"),
        ("other.npz", {}, r"other\.npz: holds x; a reference has mu and sigma, or images as 'arr_0'"),
        ("batch.npz", {}, r"batch\.npz: 'arr_0' must hold images"),
        ("set.zip", {"resolution": (3, 3)}, r"is 8x8; it must be 3x3 or a whole multiple"),
        ("set.zip", {"subset": "val"}, "no images in its folder subset='val'"),
        ("set.zip", {"max_features": -1}, r"metrics\.reference\.max_features=-1: must be 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            ReferenceSource(tmp_path / name, tmp_path / "cache", **options)
    with pytest.raises(UserError, match=r"mu\.npz: lacks 'sigma'"):
        load(tmp_path / "mu.npz")


def test_sizes_and_averaging_are_recorded(tmp_path: Path) -> None:
    images = random_images(20, 1, 16)
    path = write_zip(tmp_path / "set.zip", images)
    for resolution, averaging in ((None, (1,)), ((8, 8), (2,))):
        for _ in range(2):  # the second time from the cache
            reference = load(path, resolution=resolution)
            assert reference.resolution == (resolution or (16, 16))
            assert reference.averaging == averaging
    write_adm_samples(tmp_path / "set.npz", [images], 20, (16, 16))
    assert load(tmp_path / "set.npz", resolution=(4, 4)).describe()["averaging"] == (4,)
    write_edm(pixel_reference(images), tmp_path / "edm.npz")
    assert load(tmp_path / "edm.npz").describe()["resolution"] is None


def test_cached_reference_without_averaging_is_recomputed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", random_images(9, 1, 16))
    load(path)
    (cached,) = (tmp_path / "cache").iterdir()
    np.savez(cached, **{key: value for key, value in np.load(cached).items() if key not in ("resolution", "averaging")})
    inception = PixelFeatures()
    assert load(path, inception).averaging == (1,)
    assert inception.seen == 9


@pytest.mark.parametrize("damage", [np.zeros((1, 2), np.int64), np.zeros(0, np.int64), np.ones(1), np.ones(2000, int)])
def test_invalid_averaging_in_cache_is_rejected(tmp_path: Path, damage: np.ndarray) -> None:
    path = write_zip(tmp_path / "set.zip", random_images(9, 1, 16))
    load(path)
    (cached,) = (tmp_path / "cache").iterdir()
    np.savez(cached, **dict(np.load(cached)) | {"averaging": damage})
    with pytest.raises(UserError, match="'averaging' must be a list of integers"):
        load(path)


def test_damaged_cache_error_names_the_remedy(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", random_images(3, 1))
    load(path)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"reference-.*\.npz: not a readable \.npz .*; delete it to compute it again"):
        load(path)


def test_reference_of_one_image_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2 real images"):
        load(write_zip(tmp_path / "set.zip", random_images(1, 1)))
    assert not (tmp_path / "cache").exists()
