"""Stop training at signals."""

import os
import signal
import sys
import threading

import pytest
import torch

from relay_diffusion.training.callbacks import preemption
from relay_diffusion.training.callbacks.ema import EMA
from relay_diffusion.training.callbacks.stopping import StopAtImages
from relay_diffusion.training.trainer import build_trainer
from support import assert_same_weights, weights_of


@pytest.fixture(autouse=True)
def _in_the_foreground():
    """Handle Ctrl-C, which background jobs of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_training_saves_stops_and_continues(fit, tmp_path, signal_at, monkeypatch, capsys, number):
    fit("whole", 24)
    monkeypatch.setattr(preemption, "IGNORABLE", ())  # tests may run under nohup
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.delenv("SLURM_JOB_ID", raising=False)
        signal_at(number, 8)
        with pytest.raises(SystemExit) as ended:
            fit("parts", 24, "callbacks.grid.every_n_images=1000")
    monkeypatch.undo()
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert not list((tmp_path / "parts").rglob("*.png"))  # nothing is drawn when time runs out
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().out
    stage = fit("parts", 24)
    assert "continues" in capsys.readouterr().out
    assert stage.images_seen == 24
    weights = [weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "parts")]
    assert_same_weights(*weights)


def test_a_second_interrupt_stops_at_once(fit, tmp_path, monkeypatch, capsys):
    def on_train_batch_end(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StopAtImages, "on_train_batch_end", on_train_batch_end)
    with pytest.raises(SystemExit) as ended:
        fit("run", 24)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.index("finishing this step and saving; Ctrl-C again stops at once") < said.index("stopped at once")
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("interactive", [False, True])
def test_a_notebook_handles_interrupts_again_after_an_exit(monkeypatch, interactive):
    """A process that ends ignores a second signal; a prompt of Python continues."""
    if interactive:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)

    @preemption.restored_signal_handlers()
    def interrupted():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise SystemExit(130)

    with pytest.raises(SystemExit):
        interrupted()
    assert (signal.getsignal(signal.SIGINT) is signal.default_int_handler) == interactive


def test_an_ignored_interrupt_stays_ignored(fit):
    """Shells ignore interrupts in background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert fit("run", 8).images_seen == 8
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_signal_before_the_first_step(fit, tmp_path, monkeypatch):
    """Training saves and stops after the first step."""
    begin = EMA.on_fit_start
    monkeypatch.setattr(EMA, "on_fit_start", lambda *args: os.kill(os.getpid(), signal.SIGUSR1) or begin(*args))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit) as ended:
        fit("run", 24)
    assert ended.value.code == 128 + signal.SIGUSR1
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert content["images_seen"] == 4


@pytest.mark.slow
def test_a_signal_during_accumulation_waits_for_the_step(fit, tmp_path, monkeypatch):
    """A signal after the first of four micro-batches waits for the others."""
    plain = StopAtImages.on_train_batch_end

    def on_train_batch_end(self, trainer, pl_module, *args):
        plain(self, trainer, pl_module, *args)
        if pl_module.images_seen == 4 and pl_module.mid_accumulation:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StopAtImages, "on_train_batch_end", on_train_batch_end)
    with pytest.raises(SystemExit):
        fit("run", 24, "trainer.accumulate_grad_batches=4")
    assert weights_of(tmp_path / "run/checkpoints/last.ckpt")
    monkeypatch.undo()
    assert fit("run", 12, "trainer.accumulate_grad_batches=4").images_seen == 12


def handlers():
    return [signal.getsignal(number) for number in preemption.SIGNALS]


def test_training_that_fails_restores_the_signal_handlers(fit, monkeypatch):
    before = handlers()

    def on_train_batch_end(*_):
        assert handlers() != before
        raise ValueError("an error in training")

    monkeypatch.setattr(StopAtImages, "on_train_batch_end", on_train_batch_end)
    with pytest.raises(ValueError, match="an error in training"):
        fit("run", 8)
    assert handlers() == before


def test_a_signal_with_the_last_step_changes_nothing(fit, signal_at):
    signal_at(signal.SIGTERM, 8)
    assert fit("run", 8).images_seen == 8


def test_training_in_a_thread_handles_no_signals(fit):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(fit("run", 8).images_seen))
    thread.start()
    thread.join()
    assert ended == [8]


def test_lightning_does_not_synchronize_for_signals_at_every_step():
    """The patched method of Lightning exists."""
    trainer = build_trainer(8, accelerator="cpu")
    loop = trainer.fit_loop.epoch_loop
    assert callable(type(loop)._broadcast_sigterm_tensor)
    assert loop._broadcast_sigterm_tensor() is None  # without a group of processes the original would fail or wait
