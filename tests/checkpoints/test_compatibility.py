"""Read a run and an export of version 0.1.

Recorded: the images that they sample, and the weights after 32 more training images.
`tests/compatibility` was written on a CPU with torch 2.13. Another processor rounds in another way, hence tolerances.
"""

import shutil

import numpy as np
import pytest
import torch
from hydra.utils import get_object
from safetensors.torch import load_file

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.checkpoints.targets import translate_targets
from relay_diffusion.models.relay import Relay
from relay_diffusion.training.run import train
from support import PROJECT

FILES = PROJECT / "tests/compatibility"
TARGETS = [
    "relay_diffusion.callbacks.Checkpoints",
    "relay_diffusion.callbacks.EMA",
    "relay_diffusion.callbacks.Evaluator",
    "relay_diffusion.callbacks.PeriodicEvaluation",
    "relay_diffusion.callbacks.Preemption",
    "relay_diffusion.callbacks.SampleGrid",
    "relay_diffusion.callbacks.TrainingLog",
    "relay_diffusion.callbacks.TrainingProgress",
    "relay_diffusion.callbacks.Validation",
    "relay_diffusion.cascade.CascadeStage",
    "relay_diffusion.data.ImageDataModule",
    "relay_diffusion.data.ImageDataset",
    "relay_diffusion.data.augment.Augmentation",
    "relay_diffusion.diffusion.BlurringCorruption",
    "relay_diffusion.diffusion.ConditionedCorruption",
    "relay_diffusion.diffusion.DenoisingLoss",
    "relay_diffusion.diffusion.GaussianCorruption",
    "relay_diffusion.diffusion.LogNormal",
    "relay_diffusion.diffusion.TruncatedLogNormal",
    "relay_diffusion.loading.load_stage",
    "relay_diffusion.loggers.MetricsCSV",
    "relay_diffusion.loggers.wandb_run.WandbRun",
    "relay_diffusion.metrics.FIDMeasure",
    "relay_diffusion.metrics.Inception",
    "relay_diffusion.metrics.InceptionScoreMeasure",
    "relay_diffusion.metrics.KIDMeasure",
    "relay_diffusion.metrics.PrecisionRecallMeasure",
    "relay_diffusion.metrics.ReferenceSource",
    "relay_diffusion.metrics.SFIDMeasure",
    "relay_diffusion.metrics.protocol.adm",
    "relay_diffusion.metrics.protocol.edm",
    "relay_diffusion.networks.EDMPreconditioner",
    "relay_diffusion.networks.UNet",
    "relay_diffusion.postprocess.Enhance",
    "relay_diffusion.samplers.BlurringSampler",
    "relay_diffusion.samplers.EDMSampler",
    "relay_diffusion.stage.DiffusionStage",
    "relay_diffusion.trainer.build_trainer",
]  # of the yaml files of that version


def test_an_old_checkpoint_and_an_old_export_sample_the_same_images():
    relay = Relay({"base": load_stage(FILES / "run"), "relay": load_stage(FILES / "export")})
    images = relay.sample(range(3), torch.tensor([0, 1, -1]))
    expected = torch.from_numpy(np.load(FILES / "images.npz")["arr_0"])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_an_old_run_resumes(configuration, tmp_path):
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


@pytest.mark.parametrize("target", TARGETS)
def test_old_class_names_are_translated(target):
    (translated,) = translate_targets({"callbacks": [{"_target_": target}]})["callbacks"]
    found = get_object(translated["_target_"])
    assert found.__name__ == target.rpartition(".")[2].replace("Measure", "Metric").replace("TrainingP", "ImagesP")
    assert translate_targets(translated) == translated
