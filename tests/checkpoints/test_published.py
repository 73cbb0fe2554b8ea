"""Presets of the paper: networks and sampler settings."""

import json

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from relay_diffusion.checkpoints.export import export_stage
from relay_diffusion.sampling.run import build_relay
from support import REFERENCE

PUBLISHED = {
    "imagenet_64": "imagenet64_first_stage",
    "imagenet_256": "imagenet256_second_stage",
    "celebahq_64": "celebahq64_first_stage",
    "celebahq_256": "celebahq256_second_stage",
}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_the_published_experiments_build_the_published_networks(configuration, experiment, large_zip):
    inventory = json.loads((REFERENCE / "network_inventories.json").read_text())[PUBLISHED[experiment]]
    cfg = configuration("train", f"experiment={experiment}", f"data.dataset.path={large_zip}")
    with torch.device("meta"):
        network = instantiate(cfg.stage, _convert_="all").denoiser.network
    assert sum(p.numel() for p in network.parameters()) == inventory["parameter_count"]
    assert cfg.network.dropout == inventory["config"]["dropout"]
    assert cfg.resolution == inventory["config"]["img_resolution"]


@pytest.mark.parametrize("relay", ["imagenet_256", "celebahq_256"])
def test_the_published_sampler_settings(configuration, large_zip, tmp_path, relay):
    """Samplers of exported published stages have the published settings."""
    overrides = []
    for name, resolution in (("base", 64), ("relay", 256)):
        experiment = f"{relay.partition('_')[0]}_{resolution}"
        thin = ["network.channels=8", "network.blocks=1", f"data.dataset.path={large_zip}"]
        cfg = configuration("train", f"experiment={experiment}", *thin)
        config = OmegaConf.to_container(cfg.stage, resolve=True)
        stage = instantiate(cfg.stage, _convert_="all")
        export_stage(config, stage.denoiser.state_dict(), tmp_path / name)
        overrides.append(f"relay.stages.{name}.path={tmp_path / name}")
    cfg = configuration("sample", f"relay={relay}", *overrides)
    built = build_relay(cfg.relay)
    first, second = built.chain().values()
    corruption = second.sampler.corruption
    found = {
        "first": (
            first.sampler.evaluations,
            first.sampler.sigmas[0],
            first.sampler.sigmas[-2],
            first.sampler.sde_scale,
        ),
        "churn": (first.sampler.churn, first.sampler.churn_min, first.sampler.churn_max, first.sampler.churn_noise),
        "second": (second.sampler.evaluations, second.sampler.sigmas[-1], second.sampler.s_noise),
        "blur": (
            corruption.schedule.prob_length,
            corruption.blur_sigma_max,
            corruption.block_strength,
            corruption.block,
        ),
        "guidance": (first.guidance_scale, second.guidance_scale),
        "postprocess": repr(built.postprocess),
        "seeds": cfg.relay.seeds,
    }
    near = pytest.approx
    if relay == "imagenet_256":
        assert found["first"] == near((511, 80, 0.002, 0))
        assert found["churn"] == near((40 / 256, 0.05, 50, 1.003))
        assert found["second"] == near((199, 0.008, 0.2))
        assert found["blur"] == near((0.93, 3, 0.15, 4))
        assert found["guidance"] == (1, 3.5)
        assert found["postprocess"] == "Enhance(contrast=1.0, brightness=1.06, color=1.0)"
        assert found["seeds"] == "0-49999"
    else:
        assert found["first"] == near((239, 80, 0.002, 0.05))
        assert found["churn"][0] == 0
        assert found["second"] == near((107, 0.008, 0.2))
        assert found["blur"] == near((1.05, 2, 0.15, 4))
        assert found["guidance"] == (1, 1)
        assert found["postprocess"] == "Enhance(contrast=0.9, brightness=1.05, color=0.99)"
        assert found["seeds"] == "0-29999"
