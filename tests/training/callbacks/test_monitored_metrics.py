"""Monitor logged metrics: early stopping and the best checkpoint."""

import csv
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.config.train import validate_training
from relay_diffusion.diffusion import DenoisingLoss
from relay_diffusion.errors import UserError
from relay_diffusion.training.callbacks.checkpoints import Checkpoints
from relay_diffusion.training.callbacks.periodic import PeriodicMeasurement
from relay_diffusion.training.callbacks.training_log import TrainingLog
from support import TINY, assert_same_weights, run, weights_of

STOPPING = "+callbacks.stopping._target_=lightning.pytorch.callbacks.EarlyStopping"
MEASURED = ("+callbacks.measured._target_=test_monitored_metrics.Measured", "+callbacks.measured.every_n_images=4")
VALUES = [5.0, 3.0, 4.0, 3.0, 2.0, float("nan"), 6.0]  # at 4, 8, ... images


class Measured(PeriodicMeasurement):
    """Measurement that returns VALUES."""

    group = "eval"
    names = ("fid",)

    def measure(self, trainer, stage):  # noqa: ARG002
        return {"fid": VALUES[stage.images_seen // 4 - 1]}


class Foreign(Callback):
    """Callback of another package, which may log any metric."""


@pytest.fixture(autouse=True)
def _one_module(monkeypatch):
    """Import the classes of configs from this module."""
    monkeypatch.setitem(sys.modules, "test_monitored_metrics", sys.modules[__name__])


def rows_of(directory):
    with (directory / "log/metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def best_of(directory):
    return torch.load(directory / "checkpoints/best.ckpt", weights_only=True)


def test_logged_metrics_are_callback_metrics(fit, tmp_path):
    trainer = fit("run", 16, *MEASURED).trainer
    expected = {key: value for key, value in rows_of(tmp_path / "run")[-1].items() if "/" in key}
    assert expected["eval/fid"] == 3.0
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_training_stops_when_the_metric_stops_falling(fit, tmp_path, capsys):
    """Values 5, 3, 4, 3 stop at the fourth with patience 2."""
    stage = fit(
        "run", 100, *MEASURED, STOPPING, "+callbacks.stopping.monitor=eval/fid", "+callbacks.stopping.patience=2"
    )
    assert stage.images_seen == 16
    assert "stopped early (Monitored metric eval/fid did not improve" in capsys.readouterr().out
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["images_seen"] == 16
    assert [row["images_seen"] for row in rows_of(tmp_path / "run")] == [4, 8, 12, 16]


def test_training_stops_when_the_loss_is_constant(fit, capsys):
    stopping = [STOPPING, "+callbacks.stopping.monitor=train/loss", "+callbacks.stopping.patience=1"]
    stage = fit("run", 100, *stopping, "+callbacks.stopping.min_delta=1e6")
    assert stage.images_seen == 16  # rows at 8 and 16
    assert "stopped early (Monitored metric train/loss did not improve" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_keeps_the_remaining_patience(fit):
    """A resume neither adds nor skips a check."""
    stopping = [STOPPING, "+callbacks.stopping.monitor=eval/fid", "+callbacks.stopping.patience=2"]
    for images in (4, 8, 12):
        assert fit("run", images, *MEASURED, *stopping).images_seen == images
    assert fit("run", 100, *MEASURED, *stopping).images_seen == 16


@pytest.mark.slow
def test_a_run_resumed_from_an_earlier_step_reuses_logged_metrics(fit, tmp_path):
    fit("run", 16, *MEASURED)
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    stopping = [STOPPING, "+callbacks.stopping.monitor=eval/fid", "+callbacks.stopping.patience=2"]
    assert fit("run", 100, *MEASURED, *stopping).images_seen == 16


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(fit, tmp_path):
    best = "callbacks.checkpoints.best=eval/fid"
    fit("other", 20, *MEASURED, best, "callbacks.checkpoints.best_mode=max")
    fit("run", 28, *MEASURED, best)
    assert best_of(tmp_path / "other")["best"]["value"] == 5.0
    content = best_of(tmp_path / "run")
    assert content["best"] == {"metric": "eval/fid", "mode": "min", "value": 2.0, "images_seen": 20}
    same = tmp_path / "other/checkpoints/last.ckpt"
    assert_same_weights(weights_of(tmp_path / "run/checkpoints/best.ckpt"), weights_of(same))
    assert load_stage(tmp_path / "run/checkpoints/best.ckpt").images_seen == 20
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["images_seen"] == 28


@pytest.mark.slow
def test_two_processes_agree_on_the_best(tmp_path, small_zip):
    """Each process measures a different speed."""
    result = run(
        "train.py", *TINY, "network.channel_mult=[1]", "resolution=16", f"data.dataset.path={small_zip}",
        f"run_dir={tmp_path / 'run'}", "strategy=ddp_cpu", "trainer.max_images=24",
        "callbacks.checkpoints.best=train/images_per_second", "callbacks.checkpoints.best_mode=max",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert best_of(tmp_path / "run")["best"]["metric"] == "train/images_per_second"


@pytest.mark.slow
def test_the_final_state_can_be_the_best(fit, tmp_path):
    """The final value is measured after the last checkpoint is written."""
    fit("whole", 28)
    fit("run", 18, *MEASURED, "callbacks.measured.every_n_images=1000", "callbacks.checkpoints.best=eval/fid")
    assert best_of(tmp_path / "run")["best"]["images_seen"] == 20
    last, best = (tmp_path / f"run/checkpoints/{name}.ckpt" for name in ("last", "best"))
    assert_same_weights(weights_of(last), weights_of(best))
    fit("on", 28, f"resume={best}")
    assert_same_weights(*(weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "on")))


@pytest.mark.slow
def test_the_best_value_survives_a_resume(fit, tmp_path, capsys):
    best = "callbacks.checkpoints.best=eval/fid"
    fit("run", 8, *MEASURED, best)
    fit("run", 16, *MEASURED, best)
    assert best_of(tmp_path / "run")["best"]["images_seen"] == 8  # 4 is worse than 3, another 3 no better
    fit("run", 20, *MEASURED, best)
    assert best_of(tmp_path / "run")["best"]["images_seen"] == 20
    capsys.readouterr()
    fit("run", 28, *MEASURED, "callbacks.checkpoints.best=train/loss")
    assert "best.ckpt holds the best eval/fid (min); train/loss replaces it" in capsys.readouterr().err
    assert best_of(tmp_path / "run")["best"]["metric"] == "train/loss"


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_reported(fit, tmp_path, capsys):
    fit("run", 8, *MEASURED, "callbacks.checkpoints.best=eval/fid")
    file = tmp_path / "run/checkpoints/best.ckpt"
    file.write_bytes(file.read_bytes()[:1000])
    fit("run", 20, *MEASURED, "callbacks.checkpoints.best=eval/fid")
    said = capsys.readouterr().err
    assert "best.ckpt cannot be read" in said
    assert "the next eval/fid replaces it" in said
    assert best_of(tmp_path / "run")["best"]["images_seen"] == 20


def test_the_state_of_a_bad_step_is_not_the_best(fit, tmp_path, monkeypatch):
    step, plain = [0], DenoisingLoss.__call__

    def loss(self, *args):
        step[0] += 1
        return plain(self, *args) * (torch.nan if step[0] == 2 else 1.0)

    monkeypatch.setattr(DenoisingLoss, "__call__", loss)
    fit("run", 16, *MEASURED, "callbacks.checkpoints.best=eval/fid")
    best = best_of(tmp_path / "run")["best"]
    assert (best["value"], best["images_seen"]) == (3.0, 16)  # 3.0 at 8 images had no finite loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["callbacks.checkpoints.best=eval/fid"],
            r"callbacks\.checkpoints\.best=eval/fid: no callback logs it; .*evalua",
        ),
        (["callbacks.checkpoints.best=train/los"], r"best=train/los: no callback logs it; did you mean train/loss\?"),
        (["callbacks.checkpoints.best=train/loss_noise_5"], r"did you mean train/loss_noise_4\?"),
        ([STOPPING, "+callbacks.stopping.monitor=val/loss"], r"monitor of EarlyStopping=val/loss: no callback logs it"),
    ],
)
def test_monitoring_an_unknown_metric_is_an_error(fit, tmp_path, options, message):
    with pytest.raises(Exception, match=message) as caught:
        fit("run", 8, *options)
    assert isinstance(caught.value.__cause__, UserError)  # build_trainer's, which the command line prints
    assert not (tmp_path / "run").exists()


def test_a_metric_that_was_never_logged_is_reported(fit, tmp_path, capsys):
    """A custom callback may log it until the end."""
    foreign = "+callbacks.own._target_=test_monitored_metrics.Foreign"
    fit("run", 8, foreign, "callbacks.checkpoints.best=mine/score")
    said = capsys.readouterr().err
    assert "callbacks.checkpoints.best=mine/score was never logged" in said
    assert not (tmp_path / "run/checkpoints/best.ckpt").exists()


def test_errors_name_invalid_options(configuration):
    for override in ("callbacks.checkpoints.best_mode=low", "callbacks.checkpoints.best=[1]"):
        with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
            validate_training(configuration("train", override))
    with pytest.raises(UserError, match=r"callbacks\.stopping\.check_on_train_epoch_end=true: .*without epochs"):
        validate_training(configuration("train", STOPPING, "+callbacks.stopping.check_on_train_epoch_end=true"))
    with pytest.raises(ValueError, match="best_mode=low: use min or max"):
        Checkpoints("directory", 8, best_mode="low")


class Watch(Callback):
    """Record at each step whether the average includes the step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):  # noqa: ARG002
        self.seen.append({key: value.clone() for key, value in pl_module.ema.weights.items()})


@pytest.mark.slow
def test_the_average_does_not_depend_on_the_order_of_callbacks(fit, tmp_path, monkeypatch):
    """Callbacks before EMA see the average of the same step."""
    from relay_diffusion.training import run as training

    often = ("callbacks.checkpoints.every_n_images=4", "callbacks.checkpoints.keep=9")
    fit("expected", 12, *often)
    names = ["images-000000000004.ckpt", "images-000000000008.ckpt", "last.ckpt"]
    expected = [weights_of(tmp_path / "expected/checkpoints" / name) for name in names]
    plain = training.instantiate
    for number, first in enumerate([("checkpoints", "ema"), ("watch", "ema"), ("ema", "watch")]):
        watch = Watch()

        def instantiate(node, *args, first=first, watch=watch, **kwargs):
            built = plain(node, *args, **kwargs)
            if isinstance(built, dict) and "ema" in built:
                built = dict(built) | {"watch": watch}
                built = {name: built[name] for name in first} | built
            return built

        monkeypatch.setattr(training, "instantiate", instantiate)
        stage = fit(str(number), 12, *often)
        for name, seen, content in zip(names, watch.seen, expected, strict=True):
            assert_same_weights(weights_of(tmp_path / str(number) / "checkpoints" / name), content)
            assert all(torch.equal(value, content[f"ema.{key}"]) for key, value in seen.items())
        assert isinstance(stage.trainer.callbacks[-1], Checkpoints)


@pytest.mark.slow
def test_the_logged_property_lists_the_logged_metrics(fit, tmp_path):
    callbacks = fit("run", 64).trainer.callbacks
    log = next(c for c in callbacks if isinstance(c, TrainingLog))
    logged = {key for row in rows_of(tmp_path / "run") for key in row} - {"images_seen"}
    only_on_gpus = {"train/utilisation", "train/memory_gib"}
    assert logged - only_on_gpus == set(log.logged) - only_on_gpus
