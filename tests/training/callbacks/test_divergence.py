"""Diverged training raises an error and keeps the checkpoint."""

import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.diffusion import DenoisingLoss
from relay_diffusion.errors import UserError
from relay_diffusion.models.gradients import NonfiniteSteps
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.stopping import StopIfDiverged
from relay_diffusion.utils.quiet import quiet_libraries
from support import TINY, assert_same_weights, run, tiny_stage, weights_of

FINITE, NAN = torch.tensor([1.0, 2.0]), torch.tensor([torch.nan, torch.inf])
YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def spoil(monkeypatch):
    """Set the loss of some steps to nan for every image.

    Steps are counted from 1 over all runs of a test.
    """
    step, plain = [0], DenoisingLoss.__call__

    def choose(bad):
        def loss(self, *args):
            step[0] += 1
            return plain(self, *args) * (torch.nan if bad(step[0]) else 1.0)

        monkeypatch.setattr(DenoisingLoss, "__call__", loss)

    return choose


def counted(*steps):
    """Return the count after steps of (micro-batch losses, finite gradient, taken)."""
    counter, counts = NonfiniteSteps(), []
    assert counter.now() == 0
    for losses, finite_gradient, taken in steps:
        for per_image in losses:
            counter.add_losses(per_image)
        counter.end_step(finite_gradient, taken)
        counts.append(counter.now())
    return counts


def test_steps_without_a_finite_loss_or_gradient_are_counted_until_one_is_good():
    bad_loss, bad_gradient, good = ([NAN], YES, None), ([FINITE], NO, None), ([FINITE], YES, None)
    assert counted(good, bad_loss, bad_gradient, ([NAN], NO, None), good, bad_loss) == [0, 1, 2, 3, 0, 1]


def test_one_finite_image_makes_the_loss_of_a_step_finite():
    assert counted(([torch.tensor([torch.nan, 1.0])], YES, None), ([NAN, FINITE], YES, None)) == [0, 0]
    assert counted(([NAN, NAN], YES, None)) == [1]


def test_steps_that_the_loss_scaler_skips_are_not_counted():
    skipped, taken = ([FINITE], NO, NO), ([FINITE], YES, YES)
    assert counted(taken, *[skipped] * 30) == [0] * 31
    assert counted(([NAN], NO, NO), skipped, ([NAN], NO, NO), taken) == [1, 1, 2, 0]


@pytest.mark.slow
def test_training_that_diverges_ends_with_an_error_and_keeps_the_good_checkpoint(fit, tmp_path, small_zip):
    fit("run", 16)
    last = tmp_path / "run/checkpoints/last.ckpt"
    good = last.read_bytes()
    result = run(
        "train.py", *TINY, "network.channel_mult=[1]", "resolution=16", f"data.dataset.path={small_zip}",
        f"run_dir={tmp_path / 'run'}", "trainer.max_images=400", "stage.optimizer.lr=1e8", "stage.warmup_images=0",
        "callbacks.checkpoints.every_n_images=40",
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: training has diverged: no finite loss, or no finite gradient, in 20 consecutive st")
    assert f"{last} of 16 images is kept" in line
    assert "Traceback" not in result.stderr
    assert last.read_bytes() == good
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    assert load_stage(tmp_path / "run").images_seen == 16


@pytest.mark.slow
def test_two_processes_end_together(tmp_path, small_zip):
    result = run(
        "train.py", *TINY, "network.channel_mult=[1]", "resolution=16", f"data.dataset.path={small_zip}",
        f"run_dir={tmp_path / 'run'}", "strategy=ddp_cpu", "trainer.max_images=400", "stage.optimizer.lr=1e8",
        "stage.warmup_images=0", "trainer.max_nonfinite_steps=5",
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "error: training has diverged: no finite loss, or no finite gradient, in 5 consecutive" in result.stderr
    assert "no checkpoint exists" in result.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def test_training_ends_one_step_after_the_limit(fit, spoil):
    spoil(lambda step: step > 2)
    with pytest.raises(UserError, match=r"in 3 consecutive steps .*, after 24 images"):
        fit("run", 40, "trainer.max_nonfinite_steps=3")


def test_training_continues_after_recovered_steps(fit, spoil):
    """Two of three losses are nan; the limit is three."""
    spoil(lambda step: step % 3 != 2)
    assert fit("run", 20, "trainer.max_nonfinite_steps=3").images_seen == 20


@pytest.mark.slow
def test_a_resumed_run_resets_the_count(fit, spoil):
    spoil(lambda step: step in (2, 4, 5))
    fit("run", 12, "trainer.max_nonfinite_steps=3")
    assert fit("run", 24, "trainer.max_nonfinite_steps=3").images_seen == 24


def test_gradients_without_a_finite_element_count_as_well(fit, monkeypatch):
    plain = DiffusionStage.training_step

    def training_step(self, *args):
        outputs = plain(self, *args)
        return outputs | {"loss": outputs["loss"] * torch.nan}

    monkeypatch.setattr(DiffusionStage, "training_step", training_step)
    with pytest.raises(UserError, match=r"in 4 consecutive steps"):
        fit("run", 400, "trainer.max_nonfinite_steps=4", "network.num_classes=0")  # every weight has a gradient


def test_a_periodic_checkpoint_waits_for_a_good_step(fit, spoil, tmp_path, capsys):
    spoil(lambda step: step in (2, 3))
    fit("run", 20, "callbacks.checkpoints.every_n_images=8", "callbacks.checkpoints.keep=9")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["images-000000000016.ckpt", "last.ckpt"]
    said = capsys.readouterr().err
    assert said.count("not saved") == 1
    assert "in the last 1 steps of 8 images; no checkpoint exists" in said


@pytest.mark.slow
def test_the_end_of_training_is_not_saved_during_bad_steps(fit, spoil, tmp_path):
    last = tmp_path / "run/checkpoints/last.ckpt"
    fit("run", 8)
    good = last.read_bytes()
    spoil(lambda step: step > 2)
    with pytest.raises(UserError, match=r"diverged, its end is not saved: .*last 2 steps .*last\.ckpt of 8 images"):
        fit("run", 24)
    assert last.read_bytes() == good


@pytest.mark.slow
def test_a_signal_during_bad_steps_saves_nothing(fit, spoil, tmp_path, monkeypatch, capsys):
    last = tmp_path / "run/checkpoints/last.ckpt"
    fit("run", 8)
    good = last.read_bytes()

    def bad(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step > 1

    spoil(bad)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit) as ended:
        fit("run", 24)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "not saved: no finite loss" in capsys.readouterr().err
    assert last.read_bytes() == good


@pytest.mark.slow
@pytest.mark.parametrize("part", ["weight", "EMA weight", "optimizer state exp_avg of"])
def test_a_state_that_is_not_finite_is_not_saved(fit, tmp_path, monkeypatch, part):
    last = tmp_path / "run/checkpoints/last.ckpt"
    fit("run", 8)
    good, plain = weights_of(last), StopIfDiverged.on_train_batch_end

    def on_train_batch_end(self, trainer, pl_module, *args):
        plain(self, trainer, pl_module, *args)
        if pl_module.images_seen == 16:
            parameter = next(pl_module.denoiser.parameters())
            tensors = {
                "weight": parameter.data,
                "EMA weight": next(iter(pl_module.ema.weights.values())),
                "optimizer state exp_avg of": trainer.optimizers[0].state[parameter]["exp_avg"],
            }
            tensors[part].view(-1)[0] = torch.nan

    monkeypatch.setattr(StopIfDiverged, "on_train_batch_end", on_train_batch_end)
    with pytest.raises(UserError, match=rf"diverged: {part} .* is not finite after 16 images; .* of 8 images is kept"):
        fit("run", 40, "callbacks.checkpoints.every_n_images=16")
    assert_same_weights(weights_of(last), good)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def train_scaled(steps, init_scale, backoff, spoilt=False, max_steps=5):
    """Train in float32 with the loss scaling of fp16; return the stage."""
    with quiet_libraries():
        return _train_scaled(steps, init_scale, backoff, spoilt, max_steps)


def _train_scaled(steps, init_scale, backoff, spoilt, max_steps):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    if spoilt:
        torch.nn.init.constant_(next(iter((stage := tiny_stage(8)).denoiser.parameters())), torch.nan)
    else:
        stage = tiny_stage(8)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=backoff)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[StopIfDiverged(max_steps)],
    )  # fmt: skip
    trainer.fit(stage, DataLoader([(images, torch.zeros(4, dtype=torch.int64))] * steps, batch_size=None))
    return stage


def test_a_loss_scale_that_is_too_large_is_no_divergence(monkeypatch):
    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", lambda _: torch.autocast("cpu", enabled=False))
    stage = train_scaled(20, 2.0**127, 0.9)
    assert int(stage.replaced_gradients) > 0
    assert stage.images_seen == 80
    assert stage.nonfinite_steps.now() == 0


def test_a_loss_that_is_not_finite_is_a_divergence_at_any_loss_scale(monkeypatch):
    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", lambda _: torch.autocast("cpu", enabled=False))
    with pytest.raises(UserError, match=r"in 5 consecutive steps .*this run writes no checkpoints"):
        train_scaled(20, 2.0**10, 0.5, spoilt=True)
