"""Tiny relays 8 -> 16 with text, as exports of untrained stages."""

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from relay_diffusion.checkpoints.export import export_stage
from relay_diffusion.config import compose
from relay_diffusion.text import TransformersEncoder
from support import TINY
from tiny_encoders import DIM

MAX_TOKENS = 10


def describe(folder, max_tokens=MAX_TOKENS):
    """Return what a checkpoint holds about the encoder in a folder."""
    config = {
        "_target_": "relay_diffusion.text.TransformersEncoder", "path": str(folder), "max_tokens": max_tokens,
    }  # fmt: skip
    return {"encoder": config, "hash": TransformersEncoder(folder, max_tokens).hash}


def export_text_stage(destination, resolution, text, *overrides, block=1, classes=0):
    """Export a stage that draws something, because its zero layers are filled. text: as of `describe`, or None."""
    stage = ("stage=base",) if block == 1 else ("stage=relay", f"stage.corruption.block={block}")
    cfg = compose(
        "train",
        [
            *TINY, *stage, f"resolution={resolution}", f"network.num_classes={classes}", "data.dataset.path=x",
            f"network.context_dim={0 if text is None else DIM}", "stage.label_dropout=0.1", "run_dir=x",
            *overrides,
        ],
    )  # fmt: skip
    config = OmegaConf.to_container(cfg.stage, resolve=True)
    with torch.random.fork_rng():
        torch.manual_seed(resolution)
        denoiser = instantiate(OmegaConf.create(config)["denoiser"], _convert_="all")
        for parameter in denoiser.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    names = [f"class {index}" for index in range(classes)]
    return export_stage(config, denoiser.state_dict(), destination, names, text=text)


def export_text_relay(root, folder, classes=0):
    """Export both stages below `root` with the encoder in `folder`; return the root."""
    text = describe(folder)
    export_text_stage(root / "base", 8, text, classes=classes)
    export_text_stage(root / "relay", 16, text, block=2, classes=classes)
    return root
