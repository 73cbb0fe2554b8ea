"""Periodic FID and sFID during training."""

import csv
import math
import os

import pytest
import torch
from hydra.utils import instantiate

from fake_inception import use_small_features, write_edm
from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.data.npz import Npz
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.metrics import Evaluator, FIDMetric, SFIDMetric
from relay_diffusion.metrics.reference import read_reference
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.evaluation import PeriodicEvaluation
from support import PROJECT, TINY, run

INCEPTION = "callbacks.evaluation.evaluator.inception._target_"


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Return overrides for an evaluation with pixels as features."""
    use_small_features(monkeypatch)
    return [
        "callbacks=evaluated", "callbacks.evaluation.every_n_images=8", "callbacks.evaluation.count=10",
        "callbacks.evaluation.batch_size=4", f"callbacks.evaluation.evaluator.reference.cache={tmp_path / 'reference'}",
        f"{INCEPTION}=pixel_inception.pixels",
    ]  # fmt: skip


def rows_of(directory):
    with (directory / "log/metrics.csv").open() as file:
        return {int(row["images_seen"]): row for row in csv.DictReader(file)}


def weights_of(directory):
    content = torch.load(directory / "checkpoints/last.ckpt", weights_only=True)
    moments = {f"{i}.{k}": v for i, s in content["optimizer_states"][0]["state"].items() for k, v in s.items()}
    return content["state_dict"] | moments | {f"ema.{k}": v for k, v in content["ema"]["weights"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "relay"])
def test_metrics_are_those_of_the_ema_weights(fit, tmp_path, quick, stage):
    slow = ("callbacks.ema.ramp_up=null", "callbacks.ema.half_life_images=20", "stage.optimizer.lr=1e-2")
    trained = fit("run", 20, *quick, *slow, stage=stage)
    rows = rows_of(tmp_path / "run")
    assert [images for images, row in rows.items() if row["eval/fid"]] == [8, 16, 20]
    assert all(row["train/loss"] for row in rows.values())  # in the rows that were there
    assert len({row["eval/fid"] for row in rows.values()}) == 3

    callback = next(c for c in trained.trainer.callbacks if isinstance(c, PeriodicEvaluation))
    assert callback.evaluator.inception.seen == 24 + 3 * 10  # the reference and the samples, each once
    dataset, previous = trained.trainer.datamodule.dataset, None
    items = [dataset[i] for i in (0, 2, 4, 7, 9, 12, 14, 16, 19, 21)]  # of 24
    labels = torch.tensor([label for _, label in items])
    if stage == "relay":
        previous = block_mean(to_float(torch.stack([image for image, _ in items])), 4)
    expected = {}
    for weights in ("ema", "raw"):
        images = load_stage(tmp_path / "run", weights).sample((10, 3, 16, 16), range(10), labels, previous)
        metrics = {"fid": FIDMetric(), "sfid": SFIDMetric()}
        evaluation = Evaluator(callback.evaluator.inception, callback.evaluator.reference, metrics)
        evaluation.update(to_uint8(images), torch.arange(10))
        expected[weights] = evaluation.compute()
    for key in ("fid", "sfid"):
        assert float(rows[20][f"eval/{key}"]) == pytest.approx(expected["ema"][key], rel=1e-3)
        assert expected["raw"][key] != pytest.approx(expected["ema"][key], rel=1e-2)


@pytest.mark.slow
def test_measurement_does_not_change_training(fit, tmp_path, quick):
    hard = ("network.dropout=0.2", "stage.label_dropout=0.3", "augment=edm", "stage.augment.probability=0.5")
    fit("without", 24, *hard)
    fit("with", 24, *hard, *quick)
    without, with_it = weights_of(tmp_path / "without"), weights_of(tmp_path / "with")
    assert without.keys() == with_it.keys()
    for key in without:
        assert torch.equal(without[key], with_it[key]), key


@pytest.mark.slow
def test_a_resumed_run_does_not_repeat_measurements(fit, tmp_path, quick, monkeypatch):
    measured, update = [], Evaluator.update
    monkeypatch.setattr(Evaluator, "update", lambda self, *a: measured.append(len(a[0])) or update(self, *a))
    fit("run", 16, *quick)
    before = rows_of(tmp_path / "run")
    assert sum(measured) == 20
    (tmp_path / "run/checkpoints/last.ckpt").unlink()  # it starts again
    measured.clear()
    fit("run", 24, *quick)
    rows = rows_of(tmp_path / "run")
    assert list(rows) == [8, 16, 24]
    assert {images: rows[images] for images in before} == before
    assert sum(measured) == 10
    assert rows[24]["eval/fid"]


def test_zero_disables_the_evaluation(fit, tmp_path, quick):
    fit("run", 8, *quick, "callbacks.evaluation.every_n_images=0")
    assert "eval/fid" not in rows_of(tmp_path / "run")[8]
    assert not (tmp_path / "reference").exists()


@pytest.mark.parametrize("setting", ["count=1", "count=2.5", "batch_size=0"])
def test_errors_name_invalid_numbers(configuration, small_zip, quick, setting):
    cfg = configuration(
        "train", *TINY, *quick, "resolution=16", f"data.dataset.path={small_zip}", f"callbacks.evaluation.{setting}"
    )
    with pytest.raises(Exception, match=r"callbacks\.evaluation\.") as caught:
        instantiate(cfg.callbacks, _convert_="all")
    assert str(caught.value.__cause__).startswith(setting)


@pytest.mark.slow
def test_a_metric_that_cannot_be_computed_is_reported(fit, tmp_path, quick):
    fit("first", 8, *quick)
    cached = next(iter((tmp_path / "reference").glob("*.npz")))
    write_edm(read_reference(Npz(cached, "reference")), tmp_path / "edm.npz")
    reference = "callbacks.evaluation.evaluator.reference"
    with pytest.warns(UserWarning, match=r"callbacks\.evaluation does not measure sfid: .*no spatial statistics"):
        fit("second", 8, *quick, f"{reference}.path={tmp_path / 'edm.npz'}", f"{reference}.subset=''")
    row = rows_of(tmp_path / "second")[8]
    assert row["eval/fid"] == rows_of(tmp_path / "first")[8]["eval/fid"]
    assert "eval/sfid" not in row


def test_a_singular_covariance_is_reported_before_training(fit, quick, capsys):
    fit("run", 8, *quick)
    lines = [line.partition(":")[2].partition(" images:")[0] for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if "unreliable" in line] == [
        " callbacks.evaluation.count=10: sFID is unreliable with 10 generated and 24 reference"
    ]


@pytest.mark.slow
def test_two_processes_measure_together(fit, tmp_path, small_zip, quick):
    """Shares are uneven, and the last batch has fewer images than processes."""
    options = [*TINY, *quick, "resolution=16", f"data.dataset.path={small_zip}", "callbacks.evaluation.count=7"]
    options += ["callbacks.evaluation.batch_size=2", "network.channel_mult=[1]"]
    folders = (PROJECT / name for name in ("src", "tests"))
    path = {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    train = [*options, "trainer.max_images=20", f"run_dir={tmp_path / 'two'}", "strategy=ddp_cpu"]
    train.append(f"{INCEPTION}=pixel_inception.pixels_in_a_process_of_their_own")
    result = run("train.py", *train, **path)
    assert result.returncode == 0, result.stderr
    fit("one", 20, *options[len(TINY) :], "trainer.accumulate_grad_batches=2")
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert list(one) == list(two) == [8, 16, 20]
    for images, row in one.items():
        for key in ("eval/fid", "eval/sfid", "train/gradient_norm"):
            assert float(two[images][key]) == pytest.approx(float(row[key]), rel=1e-2), (images, key)


@pytest.mark.slow
def test_samples_that_are_not_finite_are_reported_and_not_logged(fit, tmp_path, quick, monkeypatch, capsys):
    draw = DiffusionStage.draw

    def poisoned(stage, seeds, *given, **options):
        return draw(stage, seeds, *given, **options) * (math.nan if stage.images_seen == 8 else 1)

    monkeypatch.setattr(DiffusionStage, "draw", poisoned)
    assert fit("run", 16, *quick).images_seen == 16
    assert [images for images, row in rows_of(tmp_path / "run").items() if row["eval/fid"]] == [16]
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "no evaluation" in line]
    assert warning.startswith("warning: no evaluation at 8 images, this stage: the samples of seeds 0, 1, 2, 3 are")
