"""Layers of the UNet against their formulas."""

import pytest
import torch
from torch import nn

from relay_diffusion.networks.layers import ResidualBlock, SelfAttention, SinusoidalEmbedding, group_norm
from relay_diffusion.networks.ops import convolve_enlarged, downsample, upsample
from zero_layers import randomize_zero_layers


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(2, 1), (6, 1), (20, 5), (26, 2), (36, 9), (48, 12), (50, 10), (128, 32), (192, 32), (132, 22)],
)
def test_groups_are_the_most_that_divide(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_downsampling_undoes_upsampling():
    x = torch.randn(2, 3, 3, 5)
    assert upsample(x)[0, 0, :2, :2].tolist() == [[x[0, 0, 0, 0].item()] * 2] * 2
    torch.testing.assert_close(downsample(upsample(x)), x)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 4, 5)])
def test_convolve_enlarged_equals_upsampling_and_convolving(shape):
    conv, x = nn.Conv2d(3, 5, 3, padding=1).double(), torch.randn(shape).double()
    out, bias = convolve_enlarged(conv, x)
    assert bias is None
    torch.testing.assert_close(out, conv(upsample(x)), atol=1e-12, rtol=0)


def test_embedding_is_cosines_then_sines_of_falling_frequencies():
    x = torch.tensor([0.0, 0.3, -2.0])
    angles = x[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])  # 10000^(-i / 4)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(SinusoidalEmbedding(8)(x), expected)


def test_downsampling_averages_two_by_two_pixels():
    x = torch.arange(8.0).view(1, 1, 2, 4)
    assert downsample(x).tolist() == [[[[2.5, 4.5]]]]


@pytest.mark.parametrize(("channels", "heads"), [(32, 1), (64, 1), (96, 1), (160, 1), (128, 2), (192, 3)])
def test_heads_have_sixty_four_channels_if_they_divide(channels, heads):
    assert SelfAttention(channels).heads == heads


@pytest.mark.parametrize("head_channels", [4, 8, 16])
@torch.no_grad()
def test_attention_is_the_softmax_of_each_head(head_channels):
    channels, attention = 8, randomize_zero_layers(SelfAttention(8, head_channels)).double()
    size = head_channels if head_channels <= channels else channels
    x = torch.randn(1, channels, 2, 3).double()
    q, k, v = attention.qkv(attention.norm(x)).flatten(2)[0].chunk(3)  # each [channels, pixels]
    heads = []
    for a in range(0, channels, size):
        head = slice(a, a + size)
        weights = (q[head].T @ k[head] / size**0.5).softmax(dim=1)
        heads.append(v[head] @ weights.T)
    expected = x + attention.proj(torch.cat(heads).view_as(x))
    torch.testing.assert_close(attention(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "resample"), [({}, lambda x: x), ({"up": True}, upsample), ({"down": True}, downsample)]
)
def test_a_residual_block_starts_as_its_shortcut(options, resample):
    x = torch.randn(2, 4, 6, 6)
    block = ResidualBlock(4, 4, 8, attention=True, **options)
    torch.testing.assert_close(block(x, torch.randn(2, 8)), resample(x))


@torch.no_grad()
def test_a_residual_block_equals_its_formula():
    block = randomize_zero_layers(ResidualBlock(4, 8, 6)).double()
    x, embedding = torch.randn(2, 4, 5, 5).double(), torch.randn(2, 6).double()
    silu = nn.SiLU()
    scale, shift = block.affine(embedding)[:, :, None, None].chunk(2, dim=1)
    hidden = block.norm1(block.conv0(silu(block.norm0(x)))) * (1 + scale) + shift
    expected = block.skip(x) + block.conv1(silu(hidden))
    torch.testing.assert_close(block(x, embedding), expected, atol=1e-12, rtol=0)
