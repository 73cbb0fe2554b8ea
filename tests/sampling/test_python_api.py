"""Sampling and evaluation from Python, without a configuration."""

import json

import lightning as L
from PIL import Image

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
