"""Benchmarks with results in the documentation."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.diffusion.pixels import to_float
from support import PROJECT, run


def test_bicubic_enlarges_block_means_in_order(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "real" / ("b" if number else "a")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    options = [
        f"source={tmp_path / 'real'}",
        f"destination={tmp_path / 'large.zip'}",
        "small=8",
        "subset=b",
        "factor=4",
    ]
    assert run("benchmarks/bicubic.py", *options).returncode == 0
    (made,) = open_image_set(tmp_path / "large.zip", "images").batches(9)
    assert made.shape == (2, 3, 32, 32)
    for image, original in zip(made, pixels[1:], strict=True):
        small = np.rint(original.reshape(8, 2, 8, 2, 3).mean((1, 3))).astype(np.uint8)
        expected = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
        difference = np.asarray(expected).astype(int) - image.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 2  # halves may be rounded either way


def test_bicubic_names_a_wrong_factor(tmp_path):
    result = run("benchmarks/bicubic.py", "source=demo", f"destination={tmp_path / 'a.zip'}", "factor=0")
    assert result.returncode == 2
    assert result.stderr == "error: factor=0: must be at least 1\n"


@torch.no_grad()
def test_denoising_prints_the_error_of_the_estimates():
    result = run("benchmarks/denoising.py", "count=3", "batch=2", "sigmas=0.5,2")
    assert result.returncode == 0, result.stderr
    images = ImageDataset(PROJECT / "demo/emoji-64.zip", 64, subset="heldout")
    chosen = images.__getitems__([0, 108, 217])  # of 326
    x, labels = to_float(torch.stack([image for image, _ in chosen])), torch.tensor([label for _, label in chosen])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    stage = load_stage(PROJECT / "demo/emoji_64").eval()
    printed = result.stdout.split("heldout")[1].replace(":", " ").split()
    for sigma, error in zip(printed[0::2], printed[1::2], strict=True):
        level = torch.full((len(x),), float(sigma))
        expected = (stage.denoiser(x + float(sigma) * noise, level, labels) - x).square().mean().sqrt()
        assert float(error) == pytest.approx(float(expected), abs=1e-4)
    assert printed[0::2] == ["0.5", "2"]


@pytest.mark.parametrize("sigmas", ["much", "1,0", "nan"])
def test_denoising_names_wrong_sigmas(sigmas):
    result = run("benchmarks/denoising.py", f"sigmas={sigmas}")
    assert result.returncode == 2
    assert result.stderr == f"error: sigmas={sigmas}: need numbers above 0 with commas between them, e.g. 0.1,0.5\n"


def test_grids_writes_a_row_for_each_combination(relay_runs, small_zip, tmp_path):
    stages = {name: {"path": str(relay_runs / name)} for name in ("base", "relay")}
    (tmp_path / "relay.json").write_text(json.dumps({"format": 1, "stages": stages}))
    output = tmp_path / "grids.csv"
    options = [f"relay={tmp_path}", f"images={small_zip}", f"reference={small_zip}", "subset=", f"output={output}"]
    script = str(PROJECT / "benchmarks/grids.py")
    for last in ("1,2/0.4/0.1/7/0", "2/0.4/0.1/7/0"):  # the second adds nothing
        result = run(script, *options, "first=2/80/0.1/7/0", f"last={last}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        rows = list(csv.DictReader(output.read_text().splitlines()))
        assert [row["last"] for row in rows] == ["1/0.4/0.1/7/0", "2/0.4/0.1/7/0"]
    assert all(float(row["fid"]) > 0 and float(row["sfid"]) > 0 for row in rows)


def test_grids_names_a_wrong_grid():
    result = run("benchmarks/grids.py", "last=2/0.4/0.5/7/0")
    assert result.returncode == 2
    assert result.stderr == "error: last=2/0.4/0.5/7/0: sigma_min=0.5: must be below sigma_max=0.4\n"
    result = run("benchmarks/grids.py", "first=2/0.4")
    assert result.returncode == 2
    assert result.stderr == "error: first=2/0.4: must be steps/sigma_max/sigma_min/rho/s_noise\n"


def test_sampling_compares_the_command_with_its_network(relay_runs):
    paths = " ".join(f"relay.stages.{name}.path={relay_runs / name}" for name in ("base", "relay"))
    options = ["relay=two_stages", "count=300", "batch=2", "format=zip", "precision=32-true", "accelerator=cpu"]
    result = run("benchmarks/sampling.py", *options, f"overrides={paths} picture=0")
    assert result.returncode == 0, result.stderr
    *_, setting, whole, without_start, network = result.stdout.splitlines()
    assert setting == "two_stages, 300 images in batches of 2, zip"
    for row, name, count in [
        (whole, "sample.py", 300),
        (without_start, "sample.py without its start", 296),
        (network, "network alone", 296),
    ]:
        assert row.startswith(name)
        seconds, unit, speed = row.removeprefix(name).split()[:3]
        assert unit == "s"
        assert float(seconds) * float(speed) == pytest.approx(count, rel=0.1)
    assert network.endswith("1.000 of the network")
    assert float(without_start.split()[-4]) > 0


def test_sampling_names_wrong_options():
    for option, message in [
        ("count=300", "count=300: must be a multiple of batch=256, at least 768"),
        ("count=512", "count=512: must be a multiple of batch=256, at least 768"),
        ("repeats=0", "repeats=0: must be at least 1"),
        ("format=gif", "format=gif: use png or zip"),
    ]:
        result = run("benchmarks/sampling.py", option)
        assert result.returncode == 2
        assert result.stderr == f"error: {message}\n"
