"""Training and sampling with two processes on the CPU."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fake_inception import use_small_features
from relay_diffusion.sampling.run import sample
from relay_diffusion.utils.quiet import quiet_libraries
from support import PROJECT, TINY, pythonpath, run

INCEPTION = "metrics.evaluator.inception._target_"
DDP = ("strategy=ddp_cpu", "trainer.accelerator=cpu")


def succeed(script, *arguments, **settings):
    result = run(script, *arguments, **settings, PYTHONPATH=pythonpath(PROJECT / "tests"))
    assert result.returncode == 0, result.stderr
    return result


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def training(small_zip):
    return [*TINY, "resolution=16", f"data.dataset.path={small_zip}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, training):
    """Train with one process and two micro-batches, and with two processes."""
    root, printed = tmp_path_factory.mktemp("trained"), {}
    for name, how in (("one", ["trainer.accumulate_grad_batches=2"]), ("two", DDP)):
        result = succeed("train.py", *training, "trainer.max_images=16", *how, f"run_dir={root / name}")
        printed[name] = result.stdout
    return root, printed


@pytest.fixture(scope="module")
def relay(trained):
    root, _ = trained
    return [
        "relay=two_stages", "~relay.stages.relay", f"relay.stages.base.path={root / 'two'}", "seeds=0-6",
        "picture=0", "trainer.accelerator=cpu", "batch_size=2", "save_trajectory=3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory, small_zip):
    """Return overrides for an evaluation with pixels as features."""
    cache = tmp_path_factory.mktemp("reference")
    return [
        "mode=evaluate", "metrics=adm", f"reference={small_zip}", f"metrics.reference.cache={cache}",
        f"{INCEPTION}=pixel_inception.pixels_in_a_process_of_their_own",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, relay, evaluate):
    """Sample with one process, and sample and evaluate with two processes."""
    root = tmp_path_factory.mktemp("sampled")
    succeed("sample.py", *relay, f"run_dir={root / 'one'}")
    result = succeed("sample.py", *relay, "strategy=ddp_cpu", *evaluate, f"run_dir={root / 'two'}")
    return root, result.stdout


def test_two_processes_train_as_one(trained):
    """Images, noise and weights equal those of gradient accumulation."""
    root, printed = trained
    contents = [checkpoint(root / name) for name in ("one", "two")]
    for content, name in zip(contents, ("one", "two"), strict=True):
        assert printed[name].count("new run") == 1
        assert (content["images_seen"], content["global_step"]) == (16, 4)
        rows = (root / name / "log/metrics.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows[1:]] == ["8", "16"]
    for key, value in contents[0]["state_dict"].items():
        torch.testing.assert_close(contents[1]["state_dict"][key], value, rtol=0, atol=2e-5, msg=key)


def test_one_process_resumes_at_the_data_position_of_two(trained, training, tmp_path):
    root, _ = trained
    shutil.copytree(root / "two", tmp_path / "two")
    resumed = succeed("train.py", *training, "trainer.max_images=24", f"run_dir={tmp_path / 'two'}")
    assert "with devices 2 -> 1," in resumed.stdout
    assert checkpoint(tmp_path / "two")["images_seen"] == 24


def test_two_processes_sample_as_one(sampled):
    root, printed = sampled
    alone, together = (
        {path.name: np.asarray(Image.open(path)).astype(int) for path in (root / name).rglob("seed*.png")}
        for name in ("one", "two")
    )
    assert sorted(together) == [f"seed{seed:08d}.png" for seed in range(7)]  # none missing, none twice
    assert sorted(alone) == sorted(together)
    for name in alone:
        assert np.array_equal(alone[name], together[name])  # also of the last batches, which hold fewer
    assert "FID" in printed
    drawn = [(root / name / "trajectory.png").read_bytes() for name in ("one", "two")]
    assert drawn[0] == drawn[1]  # the first images, though two devices share them


def test_two_processes_evaluate_an_uneven_number_of_images_as_one(
    configuration, evaluate, sampled, tmp_path, monkeypatch
):
    use_small_features(monkeypatch)
    root, _ = sampled
    options = [*evaluate, f"images={root / 'two/images'}", "trainer.accelerator=cpu", "batch_size=2"]
    in_process = [f"{INCEPTION}=pixel_inception.pixels", f"run_dir={tmp_path / 'one'}"]
    one = sample(configuration("sample", *options, *in_process))
    succeed("sample.py", *options, "strategy=ddp_cpu", f"run_dir={tmp_path / 'two'}")
    for directory in (root / "two", tmp_path / "two"):
        two = json.loads((directory / "metrics.json").read_text())
        for key in ("fid", "sfid", "kid", "precision", "recall", "images"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), (directory, key)


def test_two_processes_sample_the_one_image_that_is_missing(relay, evaluate, sampled, tmp_path):
    root, _ = sampled
    shutil.copytree(root / "one", tmp_path / "samples")
    options = [*evaluate, "strategy=ddp_cpu", f"run_dir={tmp_path / 'samples'}", "seeds=0-7"]
    succeed("sample.py", *relay, *options, timeout=200)
    assert json.loads((tmp_path / "samples/metrics.json").read_text())["sampled_now"] == 1
    assert len(list((tmp_path / "samples/images").rglob("*.png"))) == 8


def test_irrelevant_warnings_are_hidden():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("The AccumulateGrad node's stream does not match that of the node that ...", stacklevel=1)
            warnings.warn("Grad strides do not match bucket view strides", stacklevel=1)
    assert [str(warning.message)[:12] for warning in seen] == ["Grad strides"]
