"""The UNet against the published networks: outputs of two small ones, parameters of the four large ones."""

import json

import numpy as np
import pytest
import torch

from relay_diffusion.checkpoints.published.edm import convert_weights, published_names
from relay_diffusion.networks import EDMPreconditioner, UNet
from support import REFERENCE, class_indices

INVENTORIES = json.loads((REFERENCE / "network_inventories.json").read_text())


def unet(config):
    """Build the UNet of published constructor settings and their defaults."""
    return UNet(
        resolution=config["img_resolution"],
        channels=config["model_channels"],
        channel_mult=config["channel_mult"],
        blocks=config.get("num_blocks", 3),
        attention_resolutions=config.get("attn_resolutions", [32, 16, 8]),
        dropout=config["dropout"],
        num_classes=config.get("label_dim", 0),
        augment_labels=config.get("augment_dim", 0),
    )


def formula_weights(inventory):
    """The reference's weights: element j of parameter i is sin(0.731 j + i) / sqrt(elements of a row)."""
    state = {}
    for i, (name, shape) in enumerate(inventory):
        row = np.prod(shape[1:]) if len(shape) > 1 else 4
        values = np.sin(0.731 * np.arange(np.prod(shape)) + i) / np.sqrt(row)
        if "norm" in name and name.endswith("weight"):
            values = values + 1
        state[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return state


@pytest.mark.parametrize("name", ["net_adm_cond", "net_adm_uncond_augment"])
def test_outputs(reference, name):
    v = reference(name)
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as arrays:
        config, inventory = json.loads(str(arrays["config"])), json.loads(str(arrays["parameters"]))
    network = unet(config)
    network.load_state_dict(convert_weights(formula_weights(inventory), network))
    denoise = EDMPreconditioner(network).eval()
    labels = class_indices(v["labels"]) if v["labels"].numel() else None
    augment = v["augment_labels"] if v["augment_labels"].numel() else None
    tolerance = {"atol": 1e-4 * v["denoised"].abs().max().item(), "rtol": 0.0}
    with torch.no_grad():
        torch.testing.assert_close(denoise(v["x"], v["sigma"], labels, augment), v["denoised"], **tolerance)
        unconditional = v["denoised_unconditional"]
        torch.testing.assert_close(denoise(v["x"], v["sigma"], None, augment), unconditional, **tolerance)
        no_class = torch.full((2,), -1)
        torch.testing.assert_close(denoise(v["x"], v["sigma"], no_class, augment), unconditional, **tolerance)
    if labels is not None:
        assert (v["denoised"] - unconditional).abs().max() > 10 * tolerance["atol"]  # labels matter


@pytest.mark.parametrize("name", list(INVENTORIES))
def test_parameters_of_the_published_networks(name):
    inventory = INVENTORIES[name]
    with torch.device("meta"):
        network = unet(inventory["config"])
    assert sum(p.numel() for p in network.parameters()) == inventory["parameter_count"]
    published = {n: tuple(s) for n, s in inventory["parameters"].items()}
    ours = dict(network.named_parameters())
    mapped = {theirs: tuple(ours[name].shape) for name, theirs in published_names(network).items()}
    if "model.map_label.weight" in mapped:  # a table of classes here, a matrix there
        mapped["model.map_label.weight"] = mapped["model.map_label.weight"][::-1]
    assert mapped == published


def test_a_missing_parameter_is_named():
    network = UNet(8, channels=4, channel_mult=[1], blocks=1, attention_resolutions=[])
    with pytest.raises(KeyError, match="map_layer0"):
        convert_weights({}, network)
