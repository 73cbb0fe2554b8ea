"""Files that version 0.1 wrote: a run, an export, the images that they make and the run after 32 more images.

`tests/compatibility` was written on a CPU with torch 2.13. Another processor rounds in another way, hence tolerances.
"""

import shutil

import numpy as np
import torch
from safetensors.torch import load_file

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.models.relay import Relay
from relay_diffusion.training.run import train
from support import PROJECT

FILES = PROJECT / "tests/compatibility"


def test_an_old_checkpoint_and_an_old_export_make_the_same_images():
    relay = Relay({"base": load_stage(FILES / "run"), "relay": load_stage(FILES / "export")})
    images = relay.sample(range(3), torch.tensor([0, 1, -1]))
    expected = torch.from_numpy(np.load(FILES / "images.npz")["arr_0"])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_an_old_run_continues(configuration, tmp_path):
    shutil.copytree(FILES / "run", tmp_path / "run")
    overrides = [
        "network.channels=4", "network.channel_mult=[1,2]", "network.blocks=1", "network.num_classes=8",
        "network.attention_resolutions=[]", "stage.sampler.steps=4", "stage.optimizer.lr=1e-3",
        "stage.warmup_images=16", "trainer.accelerator=cpu", "data.num_workers=0", "data.batch_size=4", "resolution=8",
        "callbacks.grid.every_n_images=0", "trainer.max_images=64", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    stage = train(configuration("train", *overrides))
    assert stage.images_seen == 64
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    for name, expected in load_file(FILES / "continued.safetensors").items():
        kind, _, key = name.partition(".")
        if key.endswith("qkv.bias"):  # a third of it has no gradient but rounding, which Adam enlarges
            continue
        found = content["state_dict"][f"denoiser.{key}"] if kind == "raw" else content["ema"]["weights"][key]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
