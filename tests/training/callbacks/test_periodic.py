"""Periods of periodic callbacks."""

from types import SimpleNamespace

import pytest
import torch

from relay_diffusion.training.callbacks.checkpoints import Checkpoints
from relay_diffusion.training.callbacks.periodic import PeriodicCallback
from relay_diffusion.training.callbacks.sample_grid import SampleGrid
from support import tiny_stage


class Recorder(PeriodicCallback):
    """Record the images seen at each action."""

    def __init__(self, every_n_images):
        super().__init__(every_n_images)
        self.acted = []

    def act(self, trainer, stage):  # noqa: ARG002
        self.acted.append(stage.images_seen)


def train(callback, steps, signal=0, fast=False):
    """Call the hooks of a run.

    steps: images seen after each step; the first is the start.
    """
    stage, trainer = tiny_stage(4), SimpleNamespace(should_stop=False, fast_dev_run=fast)
    stage.images_seen = steps[0]
    callback.on_train_start(trainer, stage)
    for seen in steps[1:]:
        stage.images_seen, trainer.should_stop = seen, seen == steps[-1]
        callback.on_train_batch_end(trainer, stage, None, None, 0)
    stage.fit_state.stop_signal = signal
    callback.on_train_epoch_end(trainer, stage)
    return callback.acted


@pytest.mark.parametrize(
    ("every", "steps", "acted"),
    [
        (8, range(0, 25, 4), [8, 16, 24]),
        (8, range(0, 21, 4), [8, 16, 20]),  # and at the end
        (8, [12, 14, 16, 18], [16, 18]),  # a resumed run
        (8, [0, 5, 10, 30, 31], [10, 30, 31]),  # several multiples in one step count once
        (0, range(0, 25, 4), []),
    ],
)
def test_actions_at_multiples_and_at_the_end(every, steps, acted):
    assert train(Recorder(every), list(steps)) == acted


def test_a_signal_skips_the_end():
    assert train(Recorder(8), [0, 4, 8, 12], signal=15) == [8]


def test_fast_dev_run_skips_all():
    assert train(Recorder(4), [0, 4, 8], fast=True) == []


def test_pictures_are_drawn_at_the_precision_of_the_run(fit, monkeypatch):
    seen, picture = [], SampleGrid.picture
    monkeypatch.setattr(
        SampleGrid, "picture", lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or picture(*args)
    )
    fit("plain", 4, "callbacks.grid.every_n_images=4")
    fit("mixed", 4, "callbacks.grid.every_n_images=4", "trainer.precision=bf16-mixed")
    assert seen == [False, True]


def test_checkpoints_cannot_be_disabled_by_zero(configuration, tmp_path):
    """The pictures follow their interval: with 0 they would be disabled without a word."""
    with pytest.raises(ValueError, match=r"^every_n_images=0: must be at least 1; above trainer\.max_images, only the"):
        Checkpoints(str(tmp_path), 0)
    cfg = configuration("train", "callbacks.checkpoints.every_n_images=5_000_000")
    assert cfg.callbacks.grid.every_n_images == 5_000_000


def test_checkpoints_count_the_same_way(tmp_path):
    callback = Checkpoints(str(tmp_path), 8)
    assert [seen for seen in range(4, 25, 4) if callback.due(seen)] == [8, 16, 24]
