"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: its kernels then run on the CPU

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from memoized import composed, memoized_flops
from relay_diffusion.config.run_dir import register_resolvers
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.networks.flops import forward_flops
from relay_diffusion.training.callbacks import training_log
from relay_diffusion.training.callbacks.stopping import StopAtImages
from relay_diffusion.training.run import train
from relay_diffusion.utils.distributed import SIGNALS
from support import REFERENCE, TINY, run


def pytest_configure() -> None:
    torch.set_num_threads(1)  # small tensors: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"
    register_resolvers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of tests/slow and tests/hostile with the name of its folder."""
    for item in items:
        folder = item.path.parent.name
        if folder in ("slow", "hostile"):
            item.add_marker(folder)


def pytest_collection_finish() -> None:
    gc.freeze()  # collections would visit all objects of the libraries


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise a library reports these objects as leaks at exit


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    yield
    monkeypatch.undo()


@pytest.fixture(scope="session", autouse=True)
def _flops_once() -> Iterator[None]:
    """Count the FLOPs of equal networks once, not in every training run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_log, "forward_flops", memoized_flops(forward_flops))
        yield


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Load the arrays of a reference file as tensors, by the file's name without its ending."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(a) for key, a in arrays.items() if a.dtype.kind in "fiu"}

    return load


def _make_zip(path: Path, count: int, size: int) -> Path:
    generator = np.random.default_rng(0)
    with image_zip(path, ["dark", "light"]) as archive:
        for i in range(count):
            pixels = generator.integers(0, 128, (size, size, 3)) + 127 * (i % 2)
            caption = f"{('dark', 'light')[i % 2]} noise"
            archive.add(f"train/{i:03d}.png", Image.fromarray(pixels.astype(np.uint8)), i % 2, [caption])
    return path


@pytest.fixture(scope="session")
def small_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 16x16 with captions in two classes, dark and light."""
    return _make_zip(tmp_path_factory.mktemp("data") / "small.zip", 24, 16)


@pytest.fixture(scope="session")
def large_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of 256x256."""
    return _make_zip(tmp_path_factory.mktemp("data") / "large.zip", 2, 256)


@pytest.fixture
def configuration() -> Callable[..., DictConfig]:
    """Compose `name` (train or sample) with overrides, as the command line does."""

    return composed


def _fit(archive: Path, directory: Path, images: int, *overrides: str, stage: str = "base") -> DiffusionStage | None:
    options = [*TINY, f"stage={stage}", "resolution=16", f"data.dataset.path={archive}"]
    return train(composed("train", *options, f"trainer.max_images={images}", f"run_dir={directory}", *overrides))


@pytest.fixture
def fit(small_zip, tmp_path) -> Callable[..., DiffusionStage]:
    """Train a tiny stage on 16x16 images in-process; returns the stage."""

    def run(directory, images, *overrides, stage="base"):
        return _fit(small_zip, tmp_path / directory, images, *overrides, stage=stage)

    return run


@pytest.fixture
def signal_at(monkeypatch):
    """Send this process a signal after so many images; restore the signal handlers after the test."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def send(number, images):
        plain = StopAtImages.on_train_batch_end

        def on_train_batch_end(self, trainer, pl_module, *args):
            plain(self, trainer, pl_module, *args)
            if pl_module.images_seen == images and not pl_module.mid_accumulation:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(StopAtImages, "on_train_batch_end", on_train_batch_end)

    yield send
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, small_zip) -> Callable[..., Path]:
    """Train as `fit` does, once for equal options; returns the run directory, which tests only read."""

    @cache
    def run(images, *overrides, stage="base"):
        directory = tmp_path_factory.mktemp("trained") / "run"
        _fit(small_zip, directory, images, *overrides, stage=stage)
        return directory

    return run


@pytest.fixture
def trained(trained_run, tmp_path, capsys) -> Callable[..., Path]:
    """Do what `fit` does with a copy of an equal run; returns the run directory and prints nothing."""

    def run(directory, images, *overrides, **settings):
        source = trained_run(images, *overrides, **settings)
        capsys.readouterr()
        return Path(shutil.copytree(source, tmp_path / directory))

    return run


@pytest.fixture(scope="session")
def text_options(tmp_path_factory) -> list[str]:
    """Overrides of train.py for a tiny text encoder; skip the test without transformers."""
    pytest.importorskip("transformers")
    from tiny_encoders import save_encoder

    root = tmp_path_factory.mktemp("text")
    folder = save_encoder(root / "bert", "bert")
    return ["text=minilm", f"text.path={folder}", "text.max_tokens=10", f"data.text_cache={root / 'cache'}"]


@pytest.fixture(scope="session")
def relay_runs(tmp_path_factory, small_zip):
    """A tiny relay 8 -> 16, trained by the command line; its overrides for sample.py."""
    root = tmp_path_factory.mktemp("runs")
    for stage, resolution in (("base", 8), ("relay", 16)):
        result = run(
            "train.py", *TINY, f"stage={stage}", f"resolution={resolution}", f"data.dataset.path={small_zip}",
            "trainer.max_images=8", f"run_dir={root / stage}", "callbacks.grid.every_n_images=8",
            "stage.label_dropout=0.1",
            *(["stage.corruption.block=2"] if stage == "relay" else []),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    return root


@pytest.fixture
def relay_overrides(relay_runs, small_zip, tmp_path):
    return [
        "relay=two_stages",
        *(f"relay.stages.{name}.path={relay_runs / name}" for name in ("base", "relay")),
        f"reference={small_zip}",
        f"metrics.reference.cache={relay_runs / 'reference'}",
        "trainer.accelerator=cpu",
        f"run_dir={tmp_path / 'samples'}",
    ]
