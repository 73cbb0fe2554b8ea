"""Rectangular images from training to metrics."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fake_inception import use_small_features
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.run import sample
from relay_diffusion.utils.pictures import TITLE_HEIGHT


@pytest.fixture
def wide_zip(tmp_path):
    """12 images of two classes, 16 high and 24 wide."""
    path, generator = tmp_path / "wide.zip", np.random.default_rng(0)
    with image_zip(path, ["dark", "light"]) as archive:
        for index in range(12):
            pixels = generator.integers(0, 128, (16, 24, 3)) + 127 * (index % 2)
            subset = "train" if index < 8 else "heldout"
            archive.add(f"{subset}/{index}.png", Image.fromarray(pixels.astype(np.uint8)), index % 2)
    return path


@pytest.fixture
def stages(fit, wide_zip, tmp_path, monkeypatch):
    """Overrides of sample.py for a relay [8,12] -> [16,24], trained with every callback."""
    use_small_features(monkeypatch)
    data = (
        f"data.dataset.path={wide_zip}", "data.dataset.subset=train", "callbacks.grid.every_n_images=8",
        "network.channel_mult=[1,2]",  # two levels, whose factor must divide the sizes
    )  # fmt: skip
    augmented = ("augment=edm", "stage.augment.probability=1")
    validated = ("callbacks=validation", "callbacks.validation.every_n_images=8")
    evaluated = (
        "callbacks=evaluated", "callbacks.evaluation.every_n_images=8", "callbacks.evaluation.count=4",
        "callbacks.evaluation.evaluator.inception._target_=pixel_inception.pixels",
        f"callbacks.evaluation.evaluator.reference.cache={tmp_path / 'reference'}",
    )  # fmt: skip
    fit("base", 8, *validated, *data, *augmented, "resolution=[8,12]")
    fit("relay", 8, *evaluated, *data, "resolution=[16,24]", "stage.corruption.block=2", stage="relay")
    return [
        "relay=two_stages", *(f"relay.stages.{name}.path={tmp_path / name}" for name in ("base", "relay")),
        "trainer.accelerator=cpu", f"reference={wide_zip}", f"metrics.reference.cache={tmp_path / 'reference'}",
        "metrics.evaluator.inception._target_=pixel_inception.pixels",
    ]  # fmt: skip


def column(directory, name):
    with (directory / "log/metrics.csv").open() as file:
        return [row[name] for row in csv.DictReader(file) if row[name]]


def sizes(folder):
    """Return the size (width, height) of every image."""
    found = []
    for path in sorted(Path(folder).rglob("*.png")):
        with Image.open(path) as image:
            found.append(image.size)
    return found


@pytest.mark.slow
def test_rectangles_are_trained_sampled_and_evaluated(stages, configuration, wide_zip, tmp_path):
    assert column(tmp_path / "base", "val/loss")
    assert column(tmp_path / "relay", "eval/fid")
    assert sizes(tmp_path / "base/samples") == [(3 * (11 * 12 + 2) - 2, 3 * (11 * 8 + 2) - 2)]  # 8, enlarged
    assert sizes(tmp_path / "relay/samples") == [
        (3 * (3 * (6 * 24 + 2) - 2) + 2 * 12, 3 * (6 * 16 + 2) - 2 + TITLE_HEIGHT)
    ]

    def run(folder, *overrides):
        return sample(configuration("sample", *stages, f"run_dir={tmp_path / folder}", *overrides))

    results = run("whole", "mode=evaluate", "seeds=0-4", "npz=true", "save_trajectory=2", "batch_size=5")
    assert sizes(tmp_path / "whole/images") == [(24, 16)] * 5
    assert results["image_size"] == results["evaluation"]["reference"]["resolution"] == (16, 24)
    assert results["fid"] > 0
    packed = open_image_set(tmp_path / "whole/images.npz", "images")
    assert (len(packed), packed.resolution) == (5, (16, 24))
    with Image.open(tmp_path / "whole/trajectory.png") as picture:
        assert picture.height == 4 * (16 + 2) - 2
    with Image.open(tmp_path / "whole/relay.png") as picture:
        assert picture.height == 2 * (6 * 16 + 2) - 2 + TITLE_HEIGHT  # five images in rows of four

    run("other", "relay.resolution=[24,16]", "seeds=0-1")
    assert sizes(tmp_path / "other/images") == [(16, 24)] * 2
    settings = json.loads((tmp_path / "other/settings.json").read_text())
    assert [stage["resolution"] for stage in settings["stages"].values()] == [[12, 8], [24, 16]]
    with pytest.raises(UserError, match=r"different settings \(stages\.base\.resolution was \[12, 8\], is 8\)"):
        run("other", "relay.resolution=16")
    with pytest.raises(UserError, match=r"^relay\.resolution=\[24, 18\]: .* divisible by 4, .*; use \[24, 16\]"):
        run("refused", "relay.resolution=[24,18]")
    start = f"relay.start={wide_zip}"
    with pytest.raises(UserError, match=r"^relay\.start: .* is 24x16; it must be 10x8 or a whole multiple"):
        run("refused", start, "relay.resolution=[16,20]")
    assert not (tmp_path / "refused/images").exists()
    enlarged = run("large", start, "relay.resolution=[32,48]", "class=-1", "seeds=0-2")
    assert enlarged["images"] == 3
    assert sizes(tmp_path / "large/images") == [(48, 32)] * 3
