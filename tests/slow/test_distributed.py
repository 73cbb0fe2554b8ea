"""Two processes on the CPU do what many GPUs do."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.sampling.run import sample
from relay_diffusion.utils.quiet import quiet_libraries
from support import TINY, run


def test_two_processes_train_and_sample(configuration, tmp_path, small_zip):
    """Two processes are one that works through the parts of the batch in turn: same images, noise and weights."""
    options = [*TINY, "resolution=16", f"data.dataset.path={small_zip}"]
    directories = {name: f"run_dir={tmp_path / name}" for name in ("one", "two")}
    ddp = ("strategy=ddp_cpu", "trainer.accelerator=cpu")
    one = run("train.py", *options, "trainer.max_images=16", "trainer.accumulate_grad_batches=2", directories["one"])
    two = run("train.py", *options, "trainer.max_images=16", *ddp, directories["two"])
    for result in (one, two):
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("new run") == 1
    contents = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("one", "two")]
    for content, name in zip(contents, ("one", "two"), strict=True):
        assert (content["images_seen"], content["global_step"]) == (16, 4)
        rows = (tmp_path / name / "log/metrics.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows[1:]] == ["8", "16"]
    for key, value in contents[0]["state_dict"].items():
        torch.testing.assert_close(contents[1]["state_dict"][key], value, rtol=0, atol=2e-5, msg=key)

    # continuing with one process takes the same data position
    resumed = run("train.py", *options, "trainer.max_images=24", directories["two"])
    assert resumed.returncode == 0, resumed.stderr
    assert "with devices 2 -> 1," in resumed.stdout
    assert torch.load(tmp_path / "two/checkpoints/last.ckpt", weights_only=True)["images_seen"] == 24

    relay = [
        "relay=two_stages", "~relay.stages.relay", f"relay.stages.base.path={tmp_path / 'two'}", "seeds=0-6",
        "picture=0", "trainer.accelerator=cpu", "batch_size=2", "save_trajectory=3",
    ]  # fmt: skip
    evaluate = ["mode=evaluate", "metrics=adm", f"reference={small_zip}"]
    evaluate.append(f"metrics.reference.cache={tmp_path / 'reference'}")
    for name, extra in (("one_sampled", []), ("two_sampled", ["strategy=ddp_cpu", *evaluate])):
        result = run("sample.py", *relay, *extra, f"run_dir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
    alone, together = (
        {path.name: np.asarray(Image.open(path)).astype(int) for path in (tmp_path / name).rglob("seed*.png")}
        for name in ("one_sampled", "two_sampled")
    )
    assert sorted(together) == [f"seed{seed:08d}.png" for seed in range(7)]  # none missing, none doubled
    assert sorted(alone) == sorted(together)
    for name in alone:
        assert np.array_equal(alone[name], together[name])  # also of the last batches, which hold fewer
    assert "FID" in result.stdout
    drawn = [(tmp_path / name / "trajectory.png").read_bytes() for name in ("one_sampled", "two_sampled")]
    assert drawn[0] == drawn[1]  # the first images, though two devices share them

    # an uneven number of images on two processes has the numbers of one
    options = [*evaluate, f"images={tmp_path / 'two_sampled/images'}", "trainer.accelerator=cpu", "batch_size=2"]
    one = sample(configuration("sample", *options, f"run_dir={tmp_path / 'one_measured'}"))
    measured = run("sample.py", *options, "strategy=ddp_cpu", f"run_dir={tmp_path / 'two_measured'}")
    assert measured.returncode == 0, measured.stderr
    for name in ("two_sampled", "two_measured"):
        two = json.loads((tmp_path / name / "metrics.json").read_text())
        for key in ("fid", "sfid", "kid", "precision", "recall", "images"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), (name, key)

    # one image is left for two processes
    options = [*evaluate, "strategy=ddp_cpu", f"run_dir={tmp_path / 'one_sampled'}", "seeds=0-7"]
    result = run("sample.py", *relay, *options, timeout=200)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "one_sampled/metrics.json").read_text())["sampled_now"] == 1
    assert len(list((tmp_path / "one_sampled/images").rglob("*.png"))) == 8


def test_a_warning_that_no_user_can_act_on_stays_away():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("The AccumulateGrad node's stream does not match that of the node that ...", stacklevel=1)
            warnings.warn("Grad strides do not match bucket view strides", stacklevel=1)
    assert [str(warning.message)[:12] for warning in seen] == ["Grad strides"]
