"""Build a stage around the network of a published checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relay_diffusion.checkpoints.loading import build_stored
from relay_diffusion.checkpoints.published.edm import PublishedCheckpoint, convert_weights, read_published
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage, StageInfo

_SAME = ("resolution", "image_channels", "channels", "channel_mult", "blocks", "num_classes")


def published_stage(
    path: Path, config: dict[str, Any], experiment: str | None = None, trusted: Sequence[str] = ()
) -> DiffusionStage:
    """Build the stage of `config` around the network of a published checkpoint.

    `experiment`: name of the experiment in conf/experiment that `config` comes from; its network must equal that of the
    file. None: `config` is a first stage and gets the noise levels of the file's loss. The label dropout is that of the
    file if it is above 0.
    `trusted`: as for load_stage. Raises UserError naming the file or the setting that disagrees.
    """
    published = read_published(path)
    network = config["denoiser"]["network"]
    if network.get("num_classes", 0) is None:  # the experiment takes the number of its data
        network["num_classes"] = published.settings["num_classes"]
    if experiment is None:
        config["corruption"]["schedule"] |= _trained_noise(published)
    elif different := [key for key in _SAME if network.get(key) != published.settings[key]]:
        says = ", ".join(f"{key}={network.get(key)} (the file: {published.settings[key]})" for key in different)
        raise UserError(f"experiment={experiment} has another network than {path} ({says}): choose its experiment")
    channels_last = network.get("channels_last", False)  # changes speed alone
    config["denoiser"]["network"] = {
        "_target_": "relay_diffusion.networks.UNet",
        **published.settings,
        "channels_last": channels_last,
    }
    for part in ("denoiser", "loss"):
        config[part]["sigma_data"] = published.sigma_data
    config["label_dropout"] = published.label_dropout or config["label_dropout"]
    source = Path("conf/train.yaml" if experiment is None else f"conf/experiment/{experiment}.yaml")
    stage = build_stored(config, source, trusted, info=StageInfo(config))
    if not isinstance(stage, DiffusionStage):
        raise UserError(f"experiment={experiment} describes a {type(stage).__name__}, not a DiffusionStage")
    stage.denoiser.network.load_state_dict(convert_weights(published.weights, stage.denoiser.network))
    return stage.eval()


def _trained_noise(published: PublishedCheckpoint) -> dict[str, float]:
    """Return p_mean and p_std of a published loss; empty without them."""
    if published.loss is None:
        return {}
    if published.loss.class_name != "EDMLoss":
        name = ascii(published.loss.class_name)[1:-1][:60]
        raise UserError(f"{published.path} was trained with {name}: give experiment=NAME, the stage that it belongs to")
    mean, std = published.loss.state.get("P_mean"), published.loss.state.get("P_std")
    if not (isinstance(mean, int | float) and isinstance(std, int | float) and abs(mean) < 1e3 and 0 < std < 1e3):
        raise UserError(f"{published.path} holds an EDMLoss without P_mean and P_std: give experiment=NAME")
    return {"p_mean": float(mean), "p_std": float(std)}
