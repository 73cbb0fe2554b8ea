"""Grayscale, RGBA and arrays of other channels, from training to metrics."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fake_inception import use_small_features
from relay_diffusion import load_relay
from relay_diffusion.checkpoints.export import export_relay
from relay_diffusion.config.train import validate_training
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.run import sample
from relay_diffusion.utils.alpha import premultiplied, straight

PIXELS = "inception._target_=pixel_inception.pixels"


@pytest.fixture
def images(tmp_path):
    """Return a function that writes eight images of 8x12; returns their path."""

    def write(channels):
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (8, 8, 12, channels)).astype(np.uint8)
        if channels not in (1, 3, 4):
            np.savez(tmp_path / "data.npz", (pixels / 127.5 - 1).astype(np.float32), np.arange(8) % 2)
            return tmp_path / "data.npz"
        for index, image in enumerate(pixels):
            (tmp_path / "data").mkdir(exist_ok=True)
            Image.fromarray(image.squeeze()).save(tmp_path / f"data/{index}.png")
        return tmp_path / "data"

    return write


@pytest.fixture
def trained(fit, images, tmp_path, monkeypatch):
    """Return a function that trains a relay [4,6] -> [8,12]; returns overrides of sample.py."""
    use_small_features(monkeypatch)
    reference = f"reference.cache={tmp_path / 'reference'}"

    def train(channels, *overrides):
        data = images(channels)
        classes = 0 if data.is_dir() else 2
        common = (
            "data=folder", f"data.dataset.path={data}", f"data.dataset.channels={channels}",
            f"network.num_classes={classes}", "network.channel_mult=[1]", "callbacks.grid.every_n_images=4",
            "stage.warmup_images=0",  # the only step changes the last layer, which is zero before
            *overrides,
        )  # fmt: skip
        fit("base", 4, "augment=edm", "stage.augment.probability=1", *common, "resolution=[4,6]")
        fit("relay", 4, *common, "resolution=[8,12]", "stage.corruption.block=2", stage="relay")
        return [
            "relay=two_stages", *(f"relay.stages.{name}.path={tmp_path / name}" for name in ("base", "relay")),
            "trainer.accelerator=cpu", f"metrics.{reference}", f"metrics.evaluator.{PIXELS}", f"reference={data}",
        ]  # fmt: skip

    return train


def read(path):
    with Image.open(path) as image:
        image.load()
        return image


def exported_samples(tmp_path, labels):
    """Export the trained relay and sample it; return the pixels [B,H,W,C] that files of the samples have."""
    trained = load_relay({name: tmp_path / name for name in ("base", "relay")})
    export_relay(trained.chain(), tmp_path / "exported")
    exported = load_relay(tmp_path / "exported")
    samples, expected = (relay.sample(range(len(labels)), labels) for relay in (exported, trained))
    assert torch.equal(samples, expected)
    return straight(exported.finish(samples).permute(0, 2, 3, 1).numpy())


def evaluated(tmp_path):
    return (
        "callbacks=evaluated", "callbacks.evaluation.every_n_images=4", "callbacks.evaluation.count=4",
        f"callbacks.evaluation.evaluator.{PIXELS}",
        f"callbacks.evaluation.evaluator.reference.cache={tmp_path / 'reference'}",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "mode", "conversion"),
    [(1, "L", "grayscale repeated to RGB"), (4, "RGBA", "alpha composited on white")],
)
def test_image_files_of_other_channels(trained, configuration, tmp_path, channels, mode, conversion):
    stages = trained(channels, *evaluated(tmp_path))
    with (tmp_path / "relay/log/metrics.csv").open() as file:
        assert [row["eval/fid"] for row in csv.DictReader(file)] != [""]
    assert list((tmp_path / "relay/samples").glob("*.png"))

    def run(folder, *overrides):
        return sample(configuration("sample", *stages, f"run_dir={tmp_path / folder}", *overrides))

    options = ("mode=evaluate", "npz=true", "save_trajectory=1", "batch_size=4")
    assert run("whole", "seeds=0-1", "npz=true", "batch_size=4")["sampled_now"] == 2
    results = run("whole", "seeds=0-3", *options)
    assert results["sampled_now"] == 2
    assert results["fid"] > 0
    written = json.loads((tmp_path / "whole/metrics.json").read_text())
    assert written["conversions"] == [conversion]
    files = sorted((tmp_path / "whole/images").rglob("*.png"))
    opened = [read(path) for path in files]
    assert {image.mode for image in opened} == {mode}
    pixels = np.stack([np.asarray(image).reshape(8, 12, channels) for image in opened])
    with np.load(tmp_path / "whole/images.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], pixels)
    for picture in ("relay.png", "trajectory.png", "trajectory.webp"):
        assert read(tmp_path / "whole" / picture).width >= 12
    packed = run("packed", "seeds=0-3", "batch_size=4", "format=zip")
    assert packed["images"] == 4
    found = open_image_set(tmp_path / "packed/images.zip", "images", channels=channels)
    stored = torch.cat(list(found.batches(4))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(stored, premultiplied(pixels))
    np.testing.assert_array_equal(straight(stored), pixels)  # files lose no color of the samples
    np.testing.assert_array_equal(exported_samples(tmp_path, [-1] * 4), pixels)
    for path in ("whole/images", "whole/images.npz", "packed/images.zip"):
        again = run("again", "mode=evaluate", f"images={tmp_path / path}")
        assert again["fid"] == pytest.approx(results["fid"])
        assert again["conversions"] == [conversion]
    enlarged = run("large", f"relay.start={tmp_path / 'whole/images.npz'}", "relay.resolution=[16,24]")
    assert enlarged["images"] == 4
    assert {read(path).size for path in (tmp_path / "large/images").rglob("*.png")} == {(24, 16)}


@pytest.mark.slow
def test_arrays_of_five_channels(trained, configuration, tmp_path):
    stages = trained(5)
    assert list((tmp_path / "relay/samples").glob("*.png"))

    def run(folder, *overrides):
        return sample(configuration("sample", *stages, f"run_dir={tmp_path / folder}", *overrides))

    assert run("whole", "seeds=0-1")["sampled_now"] == 2
    results = run("whole", "seeds=0-4", "npz=true", "save_trajectory=1")
    assert results["sampled_now"] == 3
    files = sorted((tmp_path / "whole/images").rglob("*.npz"))
    assert [path.stem for path in files] == [f"seed{seed:08d}" for seed in range(5)]
    with np.load(tmp_path / "whole/images.npz") as arrays:
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    assert (pixels.shape, pixels.dtype, labels.tolist()) == ((5, 8, 12, 5), np.uint8, [0, 1, 0, 1, 0])
    for path, expected in zip(files, pixels, strict=True):
        with np.load(path) as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], expected[None])
    difference = exported_samples(tmp_path, labels.tolist()).astype(int) - pixels
    assert np.abs(difference).max() <= 1  # two of the files are samples of a smaller batch, which rounds differently
    files[1].write_bytes(files[1].read_bytes()[:-40])  # damaged
    assert run("whole", "seeds=0-4", "npz=true")["sampled_now"] == 1
    with pytest.raises(UserError, match=r"^mode=evaluate: Inception metrics need images of 1 .*, not 5; remove it$"):
        run("refused", "mode=evaluate", "seeds=0-3")
    with pytest.raises(UserError, match=r"^format=zip: a zip holds images of 1, 3 or 4 channels, not 5; use npz=true"):
        run("refused", "format=zip")
    with pytest.raises(UserError, match=r"^relay\.start=.*: channels=5: image files have 1 .*; use an \.npz$"):
        run("refused", "relay.start=demo/emoji-64.zip")
    assert not (tmp_path / "refused/images").exists()
    tied = ("seeds=0-1", "relay.resolution=[16,24]", "relay.consistency=true")
    large = run("large", f"relay.start={tmp_path / 'data.npz'}", *tied)
    assert large["images"] == 2
    assert large["block_mean_error"] < 30  # gray levels; clamping to 8 bits changes the means


@pytest.mark.slow
def test_inception_metrics_of_training_are_refused_for_other_channels(fit, images, tmp_path):
    data = ("data=folder", f"data.dataset.path={images(2)}", "data.dataset.channels=2", "resolution=[8,12]")
    with pytest.raises(
        UserError, match=r"^callbacks=evaluated: Inception metrics need images of 1 .*, not 2; remove it$"
    ):
        fit("run", 4, *data, *evaluated(tmp_path))
    assert fit("other", 4, *data).images_seen == 4


@pytest.mark.slow
def test_a_cascade_of_grayscale_is_conditioned_on_grayscale(fit, images):
    data = (
        "data=folder",
        f"data.dataset.path={images(1)}",
        "data.dataset.channels=1",
        "resolution=[8,12]",
        "network.num_classes=0",
    )
    stage = fit("run", 4, *data, "stage.corruption.block=2", stage="cascade")
    network = stage.denoiser.network
    assert (network.image_channels, network.condition_channels) == (1, 1)


def test_channels_of_network_and_data_agree(configuration, small_zip):
    data = ("resolution=16", f"data.dataset.path={small_zip}")
    cfg = configuration("train", *data, "data.dataset.channels=1", "network.num_classes=2")
    validate_training(cfg)
    assert cfg.network.image_channels == 1
    with pytest.raises(UserError, match=r"^network\.image_channels=3: data\.dataset\.channels=1; remove network\."):
        validate_training(configuration("train", *data, "data.dataset.channels=1", "network.image_channels=3"))
