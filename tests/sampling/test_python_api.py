"""Sampling and evaluation from Python, without a configuration."""

import json

import lightning as L
import pytest
import torch
from PIL import Image

from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from relay_diffusion.sampling.options import SamplingOptions
from relay_diffusion.sampling.plan import plan_from_noise
from relay_diffusion.sampling.run import sample_relay
from relay_diffusion.utils.quiet import quiet_libraries
from support import tiny_stage


def test_a_relay_of_built_objects_is_sampled_to_files(tmp_path):
    relay = Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2)})
    options = SamplingOptions(tmp_path / "out", batch_size=2)
    with quiet_libraries():
        trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    results = sample_relay(options, trainer, relay, plan_from_noise(range(3), [0]))
    files = sorted((tmp_path / "out/images").rglob("*.png"))
    assert (results["images"], results["sampled_now"], len(files)) == (3, 3, 3)
    with Image.open(files[0]) as image:
        assert image.size == (8, 8)
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert (settings["precision"], settings["device"]) == ("32-true", "cpu")


def sampled(tmp_path, relay, count, **options):
    with quiet_libraries():
        trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    return sample_relay(
        SamplingOptions(tmp_path / "out", **options), trainer, relay, plan_from_noise(range(count), [0])
    )


def test_images_of_other_weights_or_samplers_are_not_continued(tmp_path):
    first = tiny_stage(4)
    sampled(tmp_path, Relay({"a": first}), 2)
    assert sampled(tmp_path, Relay({"a": first}), 3)["sampled_now"] == 1
    with torch.no_grad():
        next(first.parameters()).add_(1)
    with pytest.raises(UserError, match="weights_sha256"):
        sampled(tmp_path, Relay({"a": first}), 3)
    with torch.no_grad():
        next(first.parameters()).sub_(1)
    first.sampler.sde_scale = 0.5
    with pytest.raises(UserError, match="sde_scale"):
        sampled(tmp_path, Relay({"a": first}), 3)


def test_options_are_checked(tmp_path):
    for options, message in (({"format": "zp"}, "^format=zp"), ({"png_compression": 10}, "^png_compression=10")):
        with pytest.raises(ValueError, match=message):
            SamplingOptions(tmp_path, **options)
