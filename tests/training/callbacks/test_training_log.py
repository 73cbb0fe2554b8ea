"""Metrics that training logs."""

import csv
import time

import pytest

from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.networks.flops import forward_flops
from relay_diffusion.training.callbacks.sample_grid import SampleGrid
from relay_diffusion.training.callbacks.training_log import TrainingLog


def rows_of(directory):
    """Read the log as numbers, without empty cells."""
    with (directory / "log/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key.removeprefix("train/"): float(text) for key, text in row.items() if text} for row in rows]


def test_a_short_run_is_logged_too(fit, tmp_path):
    fit("run", 8, "callbacks.log.every_n_images=1000")
    assert len(rows_of(tmp_path / "run")) == 1


def test_zero_disables_the_log(fit, tmp_path):
    assert TrainingLog(0).logged == []
    fit("run", 8, "callbacks.log.every_n_images=0")
    assert not (tmp_path / "run/log/metrics.csv").exists()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_norm_is_that_of_the_optimizer_step(fit, tmp_path, monkeypatch, accumulate):
    norms, step = [], DiffusionStage.optimizer_step

    def spy(stage, epoch, batch, optimizer, closure):
        def watched():
            loss = closure()
            norms.append(sum(float(p.grad.double().square().sum()) for p in stage.parameters()) ** 0.5)
            return loss

        step(stage, epoch, batch, optimizer, watched)

    monkeypatch.setattr(DiffusionStage, "optimizer_step", spy)
    fit("run", 24, "callbacks.log.every_n_images=8", f"trainer.accumulate_grad_batches={accumulate}")
    pairs = [norms[i : i + 2] for i in (0, 2, 4)]
    assert [row["gradient_norm"] for row in rows_of(tmp_path / "run")] == pytest.approx([sum(p) / 2 for p in pairs])
    assert len(set(norms)) == 6


@pytest.mark.slow
def test_the_half_life_of_the_average_is_the_present_one(fit, tmp_path):
    fit("run", 40, "callbacks.ema.half_life_images=1.5", "callbacks.ema.ramp_up=0.05")
    assert [row["ema_half_life"] for row in rows_of(tmp_path / "run")] == pytest.approx([0.4, 0.8, 1.2, 1.5, 1.5])
    fit("constant", 8, "callbacks.ema.ramp_up=null")
    assert rows_of(tmp_path / "constant")[0]["ema_half_life"] == 500_000
    fit("none", 8, "~callbacks.ema")
    assert "ema_half_life" not in rows_of(tmp_path / "none")[0]


@pytest.mark.slow
def test_drawing_is_excluded_from_throughput(fit, tmp_path, monkeypatch):
    picture = SampleGrid.picture
    monkeypatch.setattr(SampleGrid, "picture", lambda *args: time.sleep(2) or picture(*args))
    fit("run", 16, "callbacks.log.every_n_images=8", "callbacks.grid.every_n_images=12")
    assert rows_of(tmp_path / "run")[1]["images_per_second"] > 4  # otherwise 8 images in over 2 seconds


@pytest.mark.slow
def test_training_lowers_the_loss(fit, tmp_path):
    quick = ("stage.optimizer.lr=1e-2", "data.batch_size=8", "stage.warmup_images=40")
    fit("run", 640, *quick, "callbacks.log.every_n_images=160")
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_throughput_is_logged_in_operations(fit, tmp_path):
    stage = fit("run", 24, "callbacks.log.every_n_images=8")
    for row in rows_of(tmp_path / "run"):
        expected = row["images_per_second"] * 3 * forward_flops(stage.denoiser.network) / 1e12
        assert row["tflops"] == pytest.approx(expected)
        assert row["tflops"] > 0
        assert "utilisation" not in row  # it is measured on GPUs
