"""Rank 0 decides for all ranks, which may see a shared file system in different states."""

import pytest
import torch

from relay_diffusion.errors import UserError
from relay_diffusion.utils.distributed import on_rank_zero
from support import TINY, run

DISAGREEING = """
import os
from relay_diffusion.cli import main as commands
from relay_diffusion.{package} import {module}

if os.environ.get("LOCAL_RANK") == "1":
    {patch}
commands.{command}()
"""


def script(tmp_path, **parts):
    """Run a command in which rank 1 sees other files than rank 0."""
    path = tmp_path / "script.py"
    path.write_text(DISAGREEING.format(**parts))
    return str(path)


@pytest.mark.slow
def test_rank_zero_decides_which_checkpoint_is_resumed(tmp_path, small_zip, fit):
    """Rank 1 does not see the checkpoint yet."""
    disagreeing = script(
        tmp_path, package="training", module="resume", command="train", patch="resume.last_checkpoint = lambda _: None"
    )
    options = [*TINY, "resolution=16", f"data.dataset.path={small_zip}", f"run_dir={tmp_path / 'run'}"]
    fit("run", 8)
    result = run(disagreeing, *options, "strategy=ddp_cpu", "trainer.max_images=16", timeout=480)
    assert result.returncode == 0, result.stderr
    assert "continues" in result.stdout
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert (content["images_seen"], content["global_step"]) == (16, 4)


@pytest.mark.slow
def test_rank_zero_decides_which_images_are_missing(tmp_path, relay_overrides):
    """Rank 1 sees images that rank 0 does not see."""
    patch = "image_store.ImageStore.__contains__ = lambda *_: True"
    disagreeing = script(tmp_path, package="sampling", module="image_store", command="sample", patch=patch)
    options = [*relay_overrides, "strategy=ddp_cpu", "seeds=0-6", "batch_size=2", "picture=0"]
    result = run(disagreeing, *options, timeout=480)
    assert result.returncode == 0, result.stderr
    made = sorted(path.name for path in (tmp_path / "samples").rglob("seed*.png"))
    assert made == [f"seed{seed:08d}.png" for seed in range(7)]


class Trainer:
    """One of two ranks; `sent` is what rank 0 broadcasts."""

    def __init__(self, is_global_zero, sent):
        self.is_global_zero, self.sent, self.strategy = is_global_zero, sent, self

    def broadcast(self, value):
        if self.is_global_zero:
            self.sent.append(value)
        return self.sent[0]


def test_all_ranks_get_the_result_or_error_of_rank_zero():
    def never():
        raise AssertionError("decided on rank 1")

    def mistaken():
        raise UserError("run_dir=x: in use")

    sent = []
    assert on_rank_zero(Trainer(True, sent), lambda: [1, 2]) == on_rank_zero(Trainer(False, sent), never) == [1, 2]
    sent = []
    for trainer, decide in ((Trainer(True, sent), mistaken), (Trainer(False, sent), never)):
        with pytest.raises(UserError, match="run_dir=x: in use"):
            on_rank_zero(trainer, decide)
