"""Read published checkpoints; reject other files in one line."""

import json
from dataclasses import replace

import pytest
import torch

from forged_checkpoints import EDM, TRAINING_STATE, rewritten
from relay_diffusion.checkpoints.published.edm import (
    DHARIWAL_UNET,
    EDM_PRECOND,
    constructor_arguments,
    load_published,
    published_names,
    read_published,
    unet_settings,
)
from relay_diffusion.checkpoints.published.unpickle import StoredObject
from relay_diffusion.errors import UserError
from relay_diffusion.networks import UNet
from support import REFERENCE, class_indices, tiny_stage


def refused(path, *words):
    """Check the one-line message that rejects a file."""
    with pytest.raises(UserError) as caught:
        load_published(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250
    for word in words:
        assert word in message.removeprefix(str(path))  # which names the test


@pytest.mark.parametrize("file", [EDM, TRAINING_STATE], ids=["pkl", "pt"])
def test_reference_checkpoints(reference, file):
    v = reference(f"{file.stem}_output")
    denoise = load_published(str(file))
    assert not denoise.training
    assert denoise.network.memory_format == torch.contiguous_format
    labels = class_indices(v["labels"]) if "labels" in v else None
    tolerance = 1e-4 * v["denoised"].abs().max().item()
    with torch.no_grad():
        torch.testing.assert_close(denoise(v["x"], v["sigma"], labels), v["denoised"], atol=tolerance, rtol=0)
        if labels is not None:
            assert (denoise(v["x"], v["sigma"]) - v["denoised"]).abs().max() > 10 * tolerance  # labels matter


def test_settings_of_a_published_file():
    edm, state = read_published(EDM), read_published(TRAINING_STATE)
    assert (edm.settings["num_classes"], edm.settings["augment_labels"], edm.settings["dropout"]) == (10, 0, 0.1)
    assert (state.settings["num_classes"], state.settings["augment_labels"], state.settings["dropout"]) == (0, 9, 0.2)
    assert edm.sigma_data == state.sigma_data == 0.5
    assert edm.loss.class_name == "EDMLoss"
    assert state.loss is None


@pytest.mark.parametrize("name", json.loads((REFERENCE / "network_inventories.json").read_text()))
def test_the_published_networks(name):
    inventory = json.loads((REFERENCE / "network_inventories.json").read_text())[name]
    given = {key: value for key, value in inventory["config"].items() if key in DHARIWAL_UNET}
    channels = {"in_channels": 3, "out_channels": 3}
    settings = unet_settings(constructor_arguments(_stored(**given | channels), DHARIWAL_UNET))
    with torch.device("meta"):
        network = UNet(**settings)
    assert sum(p.numel() for p in network.parameters()) == inventory["parameter_count"]
    assert set(published_names(network).values()) == set(inventory["parameters"])


def _stored(*positional, **named):
    return StoredObject("DhariwalUNet", {"_init_args": positional, "_init_kwargs": named})


def test_settings_by_place_and_by_default():
    by_place = unet_settings(constructor_arguments(_stored(64, 3, 3, 1000, dropout=0.2), DHARIWAL_UNET))
    assert by_place == {
        "resolution": 64,
        "image_channels": 3,
        "channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "blocks": 3,
        "attention_resolutions": [32, 16, 8],
        "dropout": 0.2,
        "num_classes": 1000,
        "augment_labels": 0,
        "embedding_mult": 4,
    }
    everything = _stored(32, 1, 1, 0, 9, 128, (1, 2), 2, 1, (16,), 0.0, 0.5)
    settings = unet_settings(constructor_arguments(everything, DHARIWAL_UNET))
    assert (settings["image_channels"], settings["augment_labels"], settings["channels"]) == (1, 9, 128)
    assert (settings["embedding_mult"], settings["blocks"], settings["attention_resolutions"]) == (2, 1, [16])
    assert constructor_arguments(_stored(64, 3, 10, True, 0, 80, 0.25), EDM_PRECOND)["sigma_data"] == 0.25


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (_stored(64, 3), "without out_channels"),
        (_stored(64, 3, 3, img_resolution=32), "img_resolution given twice"),
        (_stored(*range(14)), "14 settings"),
        (_stored(64, 3, 3, encoder_type="residual"), "encoder_type"),
        (_stored(64, 3, 6), "other channels"),
        (_stored(64, 3, 3, num_blocks=10**9), "num_blocks"),
        (_stored(64, 3, 3, num_blocks=True), "num_blocks"),
        (_stored(64, 3, 3, channel_mult=[1] * 99), "channel_mult"),
        (_stored(64, 3, 3, channel_mult=[10**30]), "channel_mult"),
        (_stored(64.0, 3, 3), "img_resolution"),
        (_stored(64, 3, 3, dropout="much"), "dropout"),
        (_stored(64, 3, 3, model_channels=160), "480 channels"),
    ],
)
def test_invalid_settings_of_a_published_file(stored, words):
    with pytest.raises(ValueError, match=words):
        unet_settings(constructor_arguments(stored, DHARIWAL_UNET))


def test_narrow_published_networks_have_no_attention():
    checkpoint = read_published(EDM)
    assert checkpoint.settings["attention_resolutions"] == []
    attention = checkpoint.denoiser().network.middle[0].attention
    x = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(attention(x), x, rtol=0, atol=0)


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pkl").write_text("<html>404</html>")
    (tmp_path / "empty.pkl").touch()
    (tmp_path / "cut.pkl").write_bytes(EDM.read_bytes()[:100_000])
    (tmp_path / "cut.pt").write_bytes(TRAINING_STATE.read_bytes()[:100_000])
    torch.save({"conv.weight": torch.zeros(2), "conv.bias": torch.zeros(2)}, tmp_path / "state.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"ema": {"conv.weight": torch.zeros(2)}}, tmp_path / "ema.pt")
    weights = tiny_stage(8).denoiser.state_dict()
    torch.save({"stage_config": {}, "state_dict": weights, "ema": {"weights": weights}}, tmp_path / "own.ckpt")
    refused(tmp_path / "missing.pkl", "does not exist")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "text.pkl", "neither a pickle")
    refused(tmp_path / "empty.pkl", "is empty")
    refused(tmp_path / "cut.pkl", "damaged")
    refused(tmp_path / "cut.pt", "damaged", "not a zip")
    refused(tmp_path / "state.pt", "holds no 'ema' network, but conv.weight, conv.bias")
    refused(tmp_path / "linear.pt", "holds no 'ema' network, but weight, bias")
    refused(tmp_path / "list.pt", "a single object")
    refused(tmp_path / "module.pt", "names torch.nn.modules.linear.Linear")
    refused(tmp_path / "ema.pt", "a dict where a network is expected")
    refused(tmp_path / "own.ckpt", "a checkpoint of this project", "load_stage")


def test_other_published_networks_are_refused_by_name(tmp_path):
    path = tmp_path / "other.pkl"
    refused(rewritten(EDM, path, EDMPrecond="VPPrecond"), "holds a VPPrecond, which is not supported")
    refused(rewritten(EDM, path, DhariwalUNet="SongUNet"), "holds a SongUNet, which is not supported")
    refused(rewritten(EDM, path, ema="net"), "holds no 'ema' network, but net, loss_fn")


def test_parameters_must_be_those_of_the_network(tmp_path):
    path = tmp_path / "odd.pkl"
    refused(rewritten(EDM, path, out_norm="out_nurm"), "lacks model.out_norm.weight and 1 more")
    refused(rewritten(EDM, path, resample_filter="filter"), "model.enc.4x4_down.conv0.filter")
    checkpoint = read_published(EDM)
    extra = replace(checkpoint, weights=checkpoint.weights | {"model.extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"edm_snapshot\.pkl also holds model\.extra:"):
        extra.check()
    wider = replace(checkpoint, settings=checkpoint.settings | {"embedding_mult": 2})
    with pytest.raises(UserError, match=r"model\.map_layer0\.weight of shape \[32, 8\], but .* \[16, 8\] and"):
        wider.check()
    deeper = replace(checkpoint, settings=checkpoint.settings | {"channel_mult": [1] * 9})
    with pytest.raises(UserError, match=r"cannot be built: resolution=8: not divisible"):
        deeper.check()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = read_published(EDM).weights["model.out_conv.weight"].numpy().tobytes()
    spoiled = torch.tensor([float("nan")]).numpy().tobytes() + weights[4:]
    path = tmp_path / "nan.pkl"
    path.write_bytes(EDM.read_bytes().replace(weights, spoiled))
    refused(path, "not finite in model.out_conv.weight")


def test_a_member_with_a_flipped_bit_is_rejected(tmp_path):
    content = TRAINING_STATE.read_bytes()
    weights = read_published(TRAINING_STATE).weights["model.out_conv.weight"].numpy().tobytes()
    spoiled = bytes([weights[0] ^ 1]) + weights[1:]
    path = tmp_path / "flipped.pt"
    path.write_bytes(content.replace(weights, spoiled))
    refused(path, "damaged", "Bad CRC-32")


def test_the_authors_faster_attention_is_the_same_network():
    """The published training script always sets it."""
    given = {"img_resolution": 64, "in_channels": 3, "out_channels": 3}
    plain = unet_settings(constructor_arguments(_stored(**given), DHARIWAL_UNET))
    for faster in (True, False):
        assert unet_settings(constructor_arguments(_stored(**given, eff_attn=faster), DHARIWAL_UNET)) == plain
