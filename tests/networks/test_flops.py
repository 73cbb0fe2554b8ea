"""Operations of a network, counted on shapes."""

import pytest
import torch

from relay_diffusion.networks import UNet
from relay_diffusion.networks.flops import forward_flops

# channels at the lower level -> resolution after enlarging: the convolution there needs 4/9 of the usual operations
ENLARGED = {"64": [(384, 64), (576, 32), (768, 16)], "256": [(256, 256), (512, 128), (512, 64), (1024, 32), (1024, 16)]}


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("64", {"resolution": 64, "channels": 192, "channel_mult": (1, 2, 3, 4), "blocks": 3}, 219e9),
        ("256", {"resolution": 256, "channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "blocks": 2}, 2239e9),
    ],
)
def test_the_published_networks_cost_what_was_counted_for_them(name, options, published):
    with torch.device("meta"):
        network = UNet(**options, num_classes=1000)
    saved = sum(5 / 9 * 2 * 9 * channels**2 * size**2 for channels, size in ENLARGED[name])
    assert forward_flops(network) + saved == pytest.approx(published, rel=0.003)


def test_counting_leaves_the_network_alone():
    network = UNet(8, channels=8, channel_mult=(1, 2), blocks=1, dropout=0.5)
    before = [parameter.clone() for parameter in network.parameters()]
    assert forward_flops(network) == forward_flops(network) > 0
    assert network.training
    for a, b in zip(before, network.parameters(), strict=True):
        assert torch.equal(a, b)
