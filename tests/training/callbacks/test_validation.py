"""Loss of the EMA weights on held-out images."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError
from relay_diffusion.training.callbacks.validation import Validation
from support import TINY, run

HARD = ("network.dropout=0.2", "stage.label_dropout=0.3", "augment=edm", "stage.augment.probability=0.5")
OFTEN = ("callbacks=validation", "callbacks.validation.every_n_images=8")


@pytest.fixture(scope="module")
def split_zip(tmp_path_factory):
    """Create 24 training and 10 held-out images of two classes."""
    path = tmp_path_factory.mktemp("data") / "split.zip"
    generator = np.random.default_rng(0)
    with image_zip(path, ["dark", "light"]) as archive:
        for subset, count in (("train", 24), ("heldout", 10)):
            for i in range(count):
                pixels = generator.integers(0, 128, (16, 16, 3)) + 127 * (i % 2)
                archive.add(f"{subset}/{i:03d}.png", Image.fromarray(pixels.astype(np.uint8)), i % 2)
    return path


@pytest.fixture
def data(split_zip):
    return [f"data.dataset.path={split_zip}", "data.dataset.subset=train"]


def rows_of(directory):
    with (directory / "log/metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return {int(row["images_seen"]): {k: v for k, v in row.items() if k.startswith("val/")} for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "relay", "cascade"])
def test_measurement_does_not_change_training(fit, tmp_path, data, stage):
    contents = []
    for name, options in (("without", ()), ("with", OFTEN)):
        fit(name, 24, *HARD, *data, *options, stage=stage)
        content = torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        moments = {f"{i}.{k}": v for i, s in content["optimizer_states"][0]["state"].items() for k, v in s.items()}
        contents.append(content["state_dict"] | content["ema"]["weights"] | moments)
    assert contents[0].keys() == contents[1].keys()
    for key, value in contents[0].items():
        assert torch.equal(value, contents[1][key]), key
    rows = rows_of(tmp_path / "with")
    assert list(rows) == [8, 16, 24]
    assert all(len(row) == 5 for row in rows.values())


@pytest.mark.slow
def test_the_loss_is_that_of_the_ema_weights_at_fixed_noise(fit, tmp_path, data, split_zip):
    """The level of a case is (part + offset) / 4."""
    slow = ("callbacks.ema.ramp_up=null", "callbacks.ema.half_life_images=20", "stage.optimizer.lr=1e-2")
    fit("run", 20, *data, *OFTEN, *slow)
    dataset = ImageDataset(split_zip, 16, "heldout")
    expected = {}
    for weights in ("ema", "raw"):
        stage, losses = load_stage(tmp_path / "run", weights), np.zeros(4)
        for number in range(10):
            image, label = dataset[number]
            x0 = to_float(image)[None]
            for part in range(4):
                level = (part + (number + 0.5) * 0.6180339887498949 % 1) / 4
                sigma = stage.corruption.schedule.sigma(torch.tensor([level]))
                noise = PerImageGenerator([4 * number + part], stream=2**20).randn_like(x0)
                with torch.no_grad():
                    denoised = stage.denoiser(x0 + sigma * noise, sigma, torch.tensor([label]))
                losses[part] += float(stage.loss(denoised, x0, sigma).mean()) / 10
        expected[weights] = {"val/loss": losses.mean()} | {f"val/loss_noise_{i + 1}": x for i, x in enumerate(losses)}
    row = rows_of(tmp_path / "run")[20]
    assert row == pytest.approx(expected["ema"], rel=1e-4)
    assert row["val/loss"] != pytest.approx(expected["raw"]["val/loss"], rel=1e-3)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_batches_processes_or_the_training_seed(fit, tmp_path, data):
    still = ("stage.optimizer.lr=0", "init=" + str(tmp_path / "start"))
    fit("start", 4, *data)
    fit("one", 8, *data, *OFTEN, *still)
    fit("small", 8, *data, *OFTEN, *still, "callbacks.validation.batch_size=3", "seed=5")
    result = run(
        "train.py", *TINY, "network.channel_mult=[1]", "resolution=16", *data, *OFTEN, *still, "trainer.max_images=8",
        "strategy=ddp_cpu", f"run_dir={tmp_path / 'two'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    one = rows_of(tmp_path / "one")[8]
    assert rows_of(tmp_path / "small")[8] == pytest.approx(one, rel=1e-5)
    assert rows_of(tmp_path / "two")[8] == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_validation_chooses_the_best_checkpoint(fit, tmp_path, data):
    fit("run", 40, *data, *OFTEN, "callbacks.checkpoints.best=val/loss")
    rows = rows_of(tmp_path / "run")
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["best"]
    assert best["value"] == pytest.approx(min(row["val/loss"] for row in rows.values()), rel=1e-6)
    assert rows[best["images_seen"]]["val/loss"] == pytest.approx(best["value"], rel=1e-6)


@pytest.mark.slow
def test_a_resumed_run_does_not_repeat_measurements(fit, tmp_path, data, monkeypatch):
    fit("run", 16, *data, *OFTEN)
    before = rows_of(tmp_path / "run")
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    measured, plain = [], Validation.measure
    monkeypatch.setattr(Validation, "measure", lambda *args: measured.append(args[2].images_seen) or plain(*args))
    fit("run", 24, *data, *OFTEN)
    assert measured == [24]
    assert {images: rows_of(tmp_path / "run")[images] for images in before} == before


def test_training_images_are_rejected(fit, data):
    with pytest.raises(UserError, match=r"10 of 10 images are also in data\.dataset; set data\.dataset\.subset"):
        fit("run", 8, *data, *OFTEN, "data.dataset.subset=''")


def test_errors_name_missing_images(fit):
    with pytest.raises(Exception, match=r"callbacks\.validation\.dataset\.path=.* subset='heldout'") as caught:
        fit("run", 8, *OFTEN)
    assert isinstance(caught.value.__cause__, UserError)


def test_other_classes_are_rejected(fit, data):
    with pytest.raises(UserError, match=r"has other classes \(0\) than data\.dataset \(2\)"):
        fit("run", 8, *data, *OFTEN, "callbacks.validation.dataset.labels=false")


@pytest.mark.parametrize("setting", ["count", "batch_size", "bins"])
def test_errors_name_invalid_numbers(split_zip, setting):
    with pytest.raises(ValueError, match=f"{setting}=0"):
        Validation(ImageDataset(split_zip, 16, "heldout"), 8, **{setting: 0})


def test_validation_and_evaluation_combine(configuration):
    callbacks = configuration("train", "callbacks=evaluated", "+callbacks/parts@callbacks=validation").callbacks
    assert {"evaluation", "validation", "ema"} < set(callbacks)
    assert callbacks.validation == configuration("train", "callbacks=validation").callbacks.validation
