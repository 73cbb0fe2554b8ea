"""What training logs."""

import csv

import pytest

from relay_diffusion.networks.flops import forward_flops


def rows_of(directory):
    """The log as numbers; a noise level that no image had is left out."""
    with (directory / "log/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key.removeprefix("train/"): float(text) for key, text in row.items() if text} for row in rows]


def test_a_short_run_is_logged_too(fit, tmp_path):
    fit("run", 8, "callbacks.log.every_n_images=1000")
    assert len(rows_of(tmp_path / "run")) == 1


def test_training_lowers_the_loss(fit, tmp_path):
    fit("run", 1600, "stage.optimizer.lr=3e-3", "callbacks.log.every_n_images=400", "stage.warmup_images=100")
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]


def test_speed_is_logged_in_operations_too(fit, tmp_path):
    stage = fit("run", 24, "callbacks.log.every_n_images=8")
    for row in rows_of(tmp_path / "run"):
        expected = row["images_per_second"] * 3 * forward_flops(stage.denoiser.network) / 1e12
        assert row["tflops"] == pytest.approx(expected)
        assert row["tflops"] > 0
        assert "utilisation" not in row  # it is measured on GPUs
