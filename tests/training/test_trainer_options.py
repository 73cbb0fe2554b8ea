"""Supported and unsupported options of Lightning's Trainer."""

import csv
import inspect

import lightning as L
import pytest
import torch

from relay_diffusion.config.train import UNSUPPORTED, validate_training
from relay_diffusion.diffusion import DenoisingLoss
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.stopping import TimeLimit
from relay_diffusion.training.trainer import build_trainer
from support import TINY, assert_same_weights, run, weights_of

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def rows_of(directory):
    with (directory / "log/metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def gradients(monkeypatch):
    """Record the gradients of each optimizer step as one vector."""
    seen, clip = [], DiffusionStage.configure_gradient_clipping

    def spy(stage, *args, **kwargs):  # the last hook before the step
        clip(stage, *args, **kwargs)
        seen.append(torch.cat([p.grad.detach().float().cpu().flatten() for p in stage.denoiser.parameters()]))

    monkeypatch.setattr(DiffusionStage, "configure_gradient_clipping", spy)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_and_logged_unclipped(fit, gradients, tmp_path, device, precision):
    """Uses fused Adam, which Lightning's clipping refuses."""
    options = [f"trainer.precision={precision}", f"trainer.accelerator={device}", "callbacks.log.every_n_images=4"]
    fit("free", 4, *options)
    (free,) = gradients
    gradients.clear()
    stage = fit("clipped", 12, *options, "trainer.gradient_clip_val=0.5")
    assert all(group["fused"] for group in stage.trainer.optimizers[0].param_groups)
    assert free.norm() > 10
    assert [float(vector.norm()) for vector in gradients] == pytest.approx([0.5] * 3, rel=1e-3)
    torch.testing.assert_close(gradients[0], free * (0.5 / free.norm()), rtol=1e-3, atol=1e-6)
    logged = [float(rows_of(tmp_path / name)[0]["train/gradient_norm"]) for name in ("free", "clipped")]
    assert logged == pytest.approx([float(free.norm())] * 2, rel=1e-3)


@pytest.mark.slow
def test_gradients_below_the_limit_are_unchanged(fit, tmp_path):
    for name, options in (("free", ()), ("clipped", ("trainer.gradient_clip_val=1e9",))):
        fit(name, 16, *options)
    assert_same_weights(*(weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("free", "clipped")))


def test_each_element_can_be_clipped(fit, gradients):
    fit("run", 8, "trainer.gradient_clip_val=0.25", "trainer.gradient_clip_algorithm=value")
    assert all(vector.abs().max() == 0.25 for vector in gradients)


def test_gradients_are_clipped_after_replacement_of_nonfinite_ones(fit, gradients, monkeypatch):
    plain = DenoisingLoss.__call__

    def loss(self, *args):
        return plain(self, *args) * torch.tensor([torch.nan, 1.0, 1.0, 1.0]).view(-1, 1, 1, 1)

    monkeypatch.setattr(DenoisingLoss, "__call__", loss)
    stage = fit("run", 8, "trainer.gradient_clip_val=0.5")
    assert int(stage.replaced_gradients) > 0
    assert all(vector.isfinite().all() and vector.norm() <= 0.5 * 1.001 for vector in gradients)


@pytest.fixture
def clock(monkeypatch):
    """Advance the clock by one second per micro-batch."""
    seconds, plain, state = [0.0], TimeLimit.on_train_batch_end, TimeLimit.load_state_dict

    def on_train_batch_end(self, *args, **kwargs):
        seconds[0] += 1
        plain(self, *args, **kwargs)

    def load_state_dict(self, stored):
        state(self, {"time_elapsed": {"train": float(stored["time_elapsed"]["train"])}})

    monkeypatch.setattr(TimeLimit, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr(TimeLimit, "load_state_dict", load_state_dict)
    monkeypatch.setattr(TimeLimit, "time_elapsed", lambda self, *_: seconds[0] + self._offset)
    return seconds


@pytest.mark.slow
def test_training_saves_and_ends_at_the_time_limit(fit, tmp_path, clock, capsys):
    """The time counts over all starts, as in Lightning's Trainer."""
    half = "trainer.accumulate_grad_batches=2"
    fit("whole", 40, half)
    assert fit("run", 40, half, "trainer.max_time=00:00:00:05").images_seen == 12  # six of its ten micro-batches
    said = "stopped early (trainer.max_time=00:00:00:05): trained on 12 of 40 images"
    assert said in capsys.readouterr().out
    clock[0] = 0
    assert fit("run", 40, half, "trainer.max_time=00:00:00:05").images_seen == 12
    assert said in capsys.readouterr().out
    assert fit("run", 40, half, "trainer.max_time={minutes:9}").images_seen == 40
    assert "stopped early" not in capsys.readouterr().out
    assert_same_weights(*(weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "run")))


@pytest.mark.slow
def test_two_processes_end_together_at_the_time_limit(tmp_path, small_zip):
    result = run(
        "train.py", *TINY, "resolution=16", f"data.dataset.path={small_zip}", f"run_dir={tmp_path / 'run'}",
        "strategy=ddp_cpu", "trainer.max_images=1000000000", "trainer.max_time=00:00:00:01",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "stopped early (trainer.max_time=00:00:00:01): trained on " in result.stdout
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


@pytest.mark.slow
def test_a_number_of_batches_ends_each_start(fit, tmp_path, capsys):
    fit("whole", 24)
    assert fit("run", 24, "trainer.limit_train_batches=3").images_seen == 12
    said = capsys.readouterr().out
    assert "stopped early (trainer.limit_train_batches=3): trained on 12 of 24 images" in said
    assert fit("run", 24, "trainer.limit_train_batches=3").images_seen == 24
    assert "stopped early" not in capsys.readouterr().out
    assert_same_weights(*(weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "run")))
    assert fit("parts", 24, "trainer.limit_train_batches=3", "trainer.accumulate_grad_batches=2").images_seen == 12


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_the_report_of_a_profiler_is_in_the_directory_of_the_run(fit, tmp_path, profiler, capsys):
    fit("run", 8, f"trainer.profiler={profiler}")
    assert "run_training_batch" in (tmp_path / "run/fit-profile.txt").read_text()
    assert "times in fit-profile*.txt" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fast_run_writes_no_files(tmp_path, small_zip):
    options = [*TINY, "resolution=16", f"data.dataset.path={small_zip}", "callbacks.grid.every_n_images=4"]
    result = run("train.py", *options, "trainer.fast_dev_run=true", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert "trainer.fast_dev_run: trained on 4 images as a test, without checkpoint and log" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_fast_run_trains_full_steps_and_does_not_resume(fit, tmp_path):
    fit("run", 8)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    stage = fit(
        "run",
        40,
        "trainer.fast_dev_run=3",
        "trainer.accumulate_grad_batches=2",
        "callbacks.checkpoints.every_n_images=4",
    )
    assert (stage.images_seen, stage.trainer.global_step) == (12, 3)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_fast_run_whose_loss_is_not_finite_fails(fit, monkeypatch):
    plain = DenoisingLoss.__call__
    monkeypatch.setattr(DenoisingLoss, "__call__", lambda *args: plain(*args) * torch.nan)
    with pytest.raises(UserError, match=r"fast_dev_run: the last step had no finite loss"):
        fit("run", 8, "trainer.fast_dev_run=true")


def test_an_option_that_is_not_supported_is_refused_with_the_reason():
    result = run("train.py", "experiment=emoji_64", "+trainer.max_epochs=3")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: trainer.max_epochs is not supported: ")
    assert line.endswith("set trainer.max_images")


@pytest.mark.slow
def test_every_option_of_lightning_is_taken_or_refused_with_its_alternative(configuration):
    options = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    own = set(inspect.signature(build_trainer).parameters) - {"callbacks", "logger"}
    assert set(UNSUPPORTED) <= options - own
    for option in options - own:
        reason = rf"trainer\.{option} is not supported: \w" if option in UNSUPPORTED else "has no such option"
        with pytest.raises(UserError, match=reason):
            validate_training(configuration("train", f"+trainer.{option}=1"))


@pytest.mark.parametrize(
    "override",
    [
        "trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=many", "trainer.gradient_clip_algorithm=max",
        "trainer.max_time=8", "trainer.max_time=08:00", "trainer.max_time={hour:8}", "trainer.max_time={hours:-1}",
        "trainer.limit_train_batches=0", "trainer.limit_train_batches=0.5", "trainer.fast_dev_run=maybe",
        "trainer.profiler=fast", "trainer.max_nonfinite_steps=0", "trainer.max_nonfinite_steps=null",
    ],
)  # fmt: skip
def test_errors_name_invalid_values(configuration, override):
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
        validate_training(configuration("train", override))
