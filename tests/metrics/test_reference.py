"""Reference files of this project, ADM and EDM; spatial order; invalid files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fake_inception import (
    CHANNELS,
    POOL,
    SIZE,
    SPATIAL,
    PixelFeatures,
    pixel_reference,
    random_images,
    statistics,
    write_adm,
    write_edm,
)
from relay_diffusion.data.npz import Npz
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Reference
from relay_diffusion.metrics.reference import check_layout, read_reference

pytestmark = pytest.mark.usefixtures("small")


def read(path: Path) -> Reference:
    return read_reference(Npz(path, "reference"))


def assert_same(a: Reference, b: Reference) -> None:
    for one, other in ((a.pool, b.pool), (a.spatial, b.spatial)):
        assert one is not None
        assert other is not None
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.covariance, other.covariance)
        assert one.mean.dtype == other.covariance.dtype == torch.float64


@pytest.fixture
def reference() -> Reference:
    return pixel_reference(random_images(50, 1))


def test_own_round_trip(reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "new" / "reference.npz"
    reference.save(path)
    again = read(path)
    assert_same(again, reference)
    assert reference.features is not None
    assert again.features is not None
    assert torch.equal(again.features, reference.features)
    assert again.features.dtype == torch.float32
    assert (again.pool.n, again.layout, again.kind, again.path) == (50, "NCHW", "statistics", path)
    assert [file.name for file in path.parent.iterdir()] == ["reference.npz"], "no temporary file remains"


def test_edm_round_trip(reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "edm.npz"
    write_edm(reference, path)
    with np.load(path) as arrays:
        assert sorted(arrays) == ["mu", "sigma"]
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    again = read(path)
    assert torch.equal(again.pool.mean, reference.pool.mean)
    assert torch.equal(again.pool.covariance, reference.pool.covariance)
    assert (again.spatial, again.features, again.pool.n, again.layout) == (None, None, None, None)
    assert again.kind == "edm_statistics"


def test_adm_round_trip(reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "adm.npz"
    write_adm(reference, path)
    spatial = PixelFeatures()(random_images(50, 1)).spatial.permute(0, 2, 3, 1)
    with np.load(path) as arrays:
        assert sorted(arrays) == ["mu", "mu_s", "sigma", "sigma_s"]
        nhwc = statistics(spatial)
        torch.testing.assert_close(torch.from_numpy(arrays["mu_s"]), nhwc.mean)
        torch.testing.assert_close(torch.from_numpy(arrays["sigma_s"]), nhwc.covariance)
    again = read(path)
    assert_same(again, reference)
    assert (again.pool.n, again.layout, again.kind) == (None, "NHWC", "adm_reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "CHWN"}, "layout 'CHWN'; use 'NCHW' or 'NHWC'"),
        ({"layout": 3}, r"'layout' must be a text, not int64 of shape \[\]"),
        ({"sigma_s": None}, "lacks 'sigma_s'"),
        ({"mu_s": None}, "lacks 'mu_s'"),
        ({"mu": None}, "lacks 'mu'"),
        ({"sigma": None}, "lacks 'sigma'"),
        ({"n": 1}, "'n' must be the number of images, at least 2"),
        ({"n": -3}, "'n' must be the number of images, at least 2"),
        ({"n": 2.5}, "'n' must be the number of images, at least 2"),
        ({"n": [3]}, "'n' must be the number of images, at least 2"),
        ({"mu": np.zeros(3)}, r"'mu' must hold finite numbers of shape \[6\], not float64 of shape \[3\]"),
        ({"mu": np.full(POOL, np.nan)}, "'mu' must hold finite numbers .* not nan or infinity"),
        ({"sigma": np.full((POOL, POOL), np.inf)}, "'sigma' must hold finite numbers"),
        ({"mu": np.array(["a"] * POOL)}, "'mu' must hold finite numbers"),
        ({"mu": np.zeros(POOL, int)}, "'mu' must hold finite numbers"),
        ({"mu": np.array([None] * POOL)}, "'mu' cannot be read"),
        ({"features": np.zeros((3, 2))}, r"'features' must hold finite numbers of shape \[3, 6\]"),
        ({"features": np.float32(3)}, r"'features' must hold finite numbers of shape \[6\], not float32 of shape \[\]"),
    ],
)
def test_invalid_files(reference: Reference, tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "reference.npz"
    reference.save(path)
    arrays = {key: value for key, value in (dict(np.load(path)) | change).items() if value is not None}
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(f"reference={path}")
    assert "\n" not in str(raised.value)


def _write_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


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
def test_damaged_files(reference: Reference, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "reference.npz"
    reference.save(path)
    damage(path)
    with pytest.raises(UserError, match=r"^reference=.*reference\.npz: (not a readable|.* cannot be)"):
        read(path)


def means(between: float, within: float, layout: str) -> Tensor:
    """Draw spatial means with given standard deviations between and within channels."""
    generator = torch.Generator().manual_seed(1)
    values = between * torch.linspace(-1.5, 1.5, CHANNELS)[:, None, None]
    values = values + within * torch.randn(CHANNELS, SIZE, SIZE, generator=generator)
    return (values if layout == "NCHW" else values.permute(1, 2, 0)).flatten().double()


@pytest.mark.parametrize(("claimed", "other"), [("NCHW", "NHWC"), ("NHWC", "NCHW")])
def test_wrong_spatial_order_is_rejected(claimed: str, other: str) -> None:
    check_layout(means(1, 0.1, claimed), claimed, "file")
    with pytest.raises(UserError, match=f"file: .* should be in {claimed} order, but the values are in {other} order"):
        check_layout(means(1, 0.1, other), claimed, "file")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_ambiguous_spatial_order_is_accepted(layout: str) -> None:
    for mean in (torch.zeros(SPATIAL).double(), torch.ones(SPATIAL).double(), means(0, 1, "NCHW")):
        check_layout(mean, layout, "file")


def test_files_with_wrong_spatial_order_are_rejected(reference: Reference, tmp_path: Path) -> None:
    own, adm = tmp_path / "own.npz", tmp_path / "adm.npz"
    reference.save(own)
    write_adm(reference, adm)
    np.savez(own, **dict(np.load(own)) | {"mu_s": means(1, 0.1, "NHWC").numpy()})
    with pytest.raises(UserError, match=r"own\.npz: .* should be in NCHW order"):
        read(own)
    np.savez(adm, **dict(np.load(adm)) | {"mu_s": means(1, 0.1, "NCHW").numpy()})
    with pytest.raises(UserError, match=r"adm\.npz: .* should be in NHWC order"):
        read(adm)
    np.savez(adm, **dict(np.load(adm)) | {"layout": "NCHW"})
    assert read(adm).layout == "NCHW", "an explicit layout is used"
