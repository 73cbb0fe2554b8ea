"""Stages for tests of sampling, trained in the tests' process, with networks of one level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from relay_diffusion.training.run import train
from support import PROJECT, TINY


@pytest.fixture(scope="session")
def train_stage(small_zip: Path) -> Callable[..., None]:
    """Return a function that trains a stage on eight images."""

    def run(path: Path, *overrides: str) -> None:
        common = (*TINY, "network.channel_mult=[1]", "trainer.max_images=8", f"data.dataset.path={small_zip}")
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            train(compose("train", [*common, f"run_dir={path}", *overrides]))

    return run


@pytest.fixture(scope="session")
def relay_runs(train_stage: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relay 8 -> 16."""
    root = tmp_path_factory.mktemp("runs")
    train_stage(root / "base", "stage=base", "resolution=8", "stage.label_dropout=0.1")
    train_stage(root / "relay", "stage=relay", "resolution=16", "stage.corruption.block=2", "stage.label_dropout=0.1")
    return root
