"""FLOPs of a network, counted on shapes."""

import pytest
import torch

from relay_diffusion.networks import UNet
from relay_diffusion.networks.flops import _products_as_convolutions, forward_flops, matrix_peak

# channels at the lower level -> resolution after enlarging: the convolution there needs 4/9 of the usual operations
ENLARGED = {"64": [(384, 64), (576, 32), (768, 16)], "256": [(256, 256), (512, 128), (512, 64), (1024, 32), (1024, 16)]}


@pytest.mark.parametrize(
    ("name", "options", "published"),
    [
        ("64", {"resolution": 64, "channels": 192, "channel_mult": (1, 2, 3, 4), "blocks": 3}, 219e9),
        ("256", {"resolution": 256, "channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "blocks": 2}, 2239e9),
    ],
)
def test_flops_of_the_published_networks(name, options, published):
    with torch.device("meta"):
        network = UNet(**options, num_classes=1000)
    saved = sum(5 / 9 * 2 * 9 * channels**2 * size**2 for channels, size in ENLARGED[name])
    assert forward_flops(network) + saved == pytest.approx(published, rel=0.003)


def test_operations_are_in_proportion_to_the_pixels():
    network = UNet([8, 16], channels=8, channel_mult=(1, 2), blocks=1, attention_resolutions=())
    for part in network.middle:
        part.attention = None  # the only operations that grow faster
    embeddings = forward_flops(network, (2, 2)) * 2 - forward_flops(network, (2, 4))
    assert forward_flops(network) == forward_flops(network, (16, 8))
    assert forward_flops(network) - embeddings == 32 * (forward_flops(network, (2, 2)) - embeddings)


def test_a_condition_costs_input_channels_and_an_embedding():
    plain, conditioned = (UNet(8, channels=16, channel_mult=(1, 2), blocks=1, condition_channels=k) for k in (0, 3))
    first_convolution, embedding = 2 * 9 * 3 * 16 * 8**2, 2 * 16**2
    assert forward_flops(conditioned) - forward_flops(plain) == first_convolution + embedding


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_text_costs_cross_attention_to_its_tokens_and_the_null_token(tokens):
    options = {"channels": 16, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (8,)}
    plain, text = (UNet(8, **options, context_dim=dim) for dim in (0, 6))
    expected = 2 * 6 * 64  # of the pooled embedding
    for channels, pixels, blocks in ((16, 8**2, 3), (32, 4**2, 1)):
        query_and_output, key_and_value = 2 * 2 * pixels * channels**2, 2 * (tokens + 1) * 6 * 2 * channels
        expected += blocks * (query_and_output + key_and_value + 2 * 2 * pixels * (tokens + 1) * channels)
    assert forward_flops(text, tokens=tokens) - forward_flops(plain) == expected


def test_counting_leaves_the_network_alone():
    network = UNet(8, channels=8, channel_mult=(1, 2), blocks=1, dropout=0.5)
    before = [parameter.clone() for parameter in network.parameters()]
    assert forward_flops(network) == forward_flops(network) > 0
    assert network.training
    for a, b in zip(before, network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_matrix_products_are_timed_in_the_precision_of_convolutions():
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision

    def fail() -> None:
        with _products_as_convolutions():
            seen.append(matmul.fp32_precision)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [torch.backends.cudnn.conv.fp32_precision]
    assert matmul.fp32_precision == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")
def test_the_peak_is_flops_over_seconds_of_a_product():
    device, half = torch.device("cuda"), torch.bfloat16
    peak = matrix_peak(device, half, size=4096)
    a = torch.randn(4096, 4096, device=device, dtype=half)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        a @ a
    end.record()
    end.synchronize()
    assert peak == pytest.approx(20 * 2 * 4096**3 / (start.elapsed_time(end) / 1e3), rel=0.5)
