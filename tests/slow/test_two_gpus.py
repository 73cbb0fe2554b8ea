"""Training and sampling on two GPUs with NCCL and CUDA graphs."""

import csv
import io
import os
import signal
import zipfile

import pytest
import torch
from PIL import Image

from processes import Process, child_of, ended, until
from relay_diffusion.data.zip_writer import image_zip
from support import PROJECT, run

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
TWO = ("strategy=ddp", "trainer.devices=2")
BATCH, WINDOW = {"base": 128, "relay": 32}, 10  # images a step, steps of a row of the log
EXPERIMENTS = {"base": "emoji_64", "relay": "emoji_256"}
LATE = 60  # seconds in which a stopped run is gone


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Enlarge 200 emoji to 256x256."""
    path = tmp_path_factory.mktemp("large") / "emoji.zip"
    with zipfile.ZipFile(PROJECT / "demo/emoji-64.zip") as source, image_zip(path, list("abcdefgh")) as target:
        names = [name for name in source.namelist() if name.startswith("train/")][::14][:200]
        for number, name in enumerate(names):
            image = (
                Image.open(io.BytesIO(source.read(name))).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
            )
            target.add(f"train/{number:03d}.png", image, number % 8)
    return path


def options(stage, data, steps, directory):
    batch = BATCH[stage]
    return [
        f"experiment={EXPERIMENTS[stage]}", f"data.dataset.path={data}", f"data.batch_size={batch}",
        f"callbacks.log.every_n_images={batch * WINDOW}", "callbacks.grid.every_n_images=0",
        f"trainer.max_images={batch * steps}", f"run_dir={directory}",
    ]  # fmt: skip


def rows(directory):
    log = directory / "log/metrics.csv"
    return list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []


@pytest.fixture(scope="module")
def runs(large, tmp_path_factory):
    """Train both stages on two GPUs and by accumulation on one."""
    root = tmp_path_factory.mktemp("runs")
    for stage in EXPERIMENTS:
        for name, how in (("two", TWO), ("one", ("trainer.accumulate_grad_batches=2",))):
            result = run("train.py", *options(stage, large, 4 * WINDOW, root / f"{stage}-{name}"), *how)
            assert result.returncode == 0, result.stderr
    return root


@pytest.mark.parametrize("stage", EXPERIMENTS)
def test_two_gpus_train_as_one(runs, stage):
    two, one = rows(runs / f"{stage}-two"), rows(runs / f"{stage}-one")
    assert [row["images_seen"] for row in two] == [row["images_seen"] for row in one]
    assert len(two) == 4
    for mine, theirs in zip(two, one, strict=True):
        assert float(mine["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=0.02)
        assert float(mine["train/gradient_norm"]) == pytest.approx(float(theirs["train/gradient_norm"]), rel=0.1)


@pytest.mark.parametrize(
    ("stage", "number", "to_child", "code", "graphs"),
    [
        ("base", signal.SIGTERM, True, 143, "true"),
        ("relay", signal.SIGUSR1, False, 138, "true"),
        ("relay", signal.SIGUSR1, False, 138, "false"),
    ],
)
def test_a_signal_to_one_ends_both(large, tmp_path, stage, number, to_child, code, graphs):
    endless = options(stage, large, 10**6, tmp_path / "run")
    command = [PROJECT / "train.py", *endless, *TWO, f"stage.cuda_graphs={graphs}"]
    with ended([Process(tmp_path / "output.txt", command)]) as (process,):
        until(lambda: len(rows(tmp_path / "run")) >= 2, [process])
        os.kill(child_of(process.popen.pid) if to_child else process.popen.pid, number)
        assert process.popen.wait(LATE) == code, process.text()
    seen = int(rows(tmp_path / "run")[-1]["images_seen"])
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["images_seen"] == seen


def test_two_gpus_sample_as_one(runs, tmp_path):
    relay = ["relay=two_stages", *(f"relay.stages.{stage}.path={runs / stage}-two" for stage in EXPERIMENTS)]
    relay += ["seeds=0-36", "batch_size=8", "picture=0", "trainer.precision=bf16-mixed"]
    for name, how in (("one", ()), ("two", TWO)):
        result = run("sample.py", *relay, *how, f"output={tmp_path / name}")
        assert result.returncode == 0, result.stderr
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).rglob("seed*.png")} for name in ("one", "two"))
    assert len(one) == 37
    assert one == two
