"""Text as a condition of the network: cross-attention, null token, pooled embedding."""

import pytest
import torch

from relay_diffusion.diffusion.text_states import TextStates, concatenate, no_text
from relay_diffusion.networks import EDMPreconditioner, Prompted, Prompts, UNet
from relay_diffusion.networks.layers import CrossAttention, SelfAttention
from text_rows import random_text
from zero_layers import randomize_zero_layers

NOISE = torch.tensor([-0.7, 0.4, 0.1])
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def unet(context_dim=6, **options):
    options = {"channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)} | options
    return UNet(8, context_dim=context_dim, **options)


def text_weights(network):
    return {name for name in network.state_dict() if "text" in name or "null_token" in name or "cross_" in name}


@torch.no_grad()
def test_without_cross_attention_output_the_network_is_that_without_text():
    """A new text network with the weights of a network without text computes the same, to the last bit."""
    torch.manual_seed(3)
    plain = unet(0, num_classes=2)
    torch.manual_seed(3)
    weights = UNet(8, channels=8, channel_mult=(1, 2), blocks=1, attention_resolutions=(4,), num_classes=2).state_dict()
    assert list(weights) == list(plain.state_dict())
    assert all(torch.equal(weights[name], weight) for name, weight in plain.state_dict().items())
    assert text_weights(plain) == set()
    randomize_zero_layers(plain)
    text = unet(num_classes=2).eval()
    assert text.state_dict().keys() - plain.state_dict().keys() == text_weights(text)
    text.load_state_dict(plain.state_dict(), strict=False)
    labels = torch.tensor([0, 1, -1])
    assert torch.equal(text(X, NOISE, labels), plain(X, NOISE, labels))


def test_each_block_with_self_attention_has_cross_attention():
    network = unet(blocks=2, attention_resolutions=(8,))
    blocks = [module for module in network.modules() if isinstance(getattr(module, "attention", None), SelfAttention)]
    assert len(blocks) == 6
    assert all(isinstance(block.cross_attention, CrossAttention) for block in blocks)
    assert sum(isinstance(module, CrossAttention) for module in network.modules()) == 6


@pytest.mark.parametrize("head_channels", [4, 8])
@torch.no_grad()
def test_cross_attention_equals_its_formula(head_channels):
    attention = randomize_zero_layers(CrossAttention(8, 6, head_channels)).double()
    x, tokens = torch.randn(2, 8, 2, 3).double(), torch.randn(2, 4, 6).double()
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    got = attention(x, TextStates(tokens, mask, tokens[:, 0]))
    q = attention.query(attention.norm(x).flatten(2).mT)
    k, v = attention.key_value(attention.norm_tokens(tokens)).chunk(2, dim=-1)
    for i in range(2):
        heads = []
        for first in range(0, 8, head_channels):
            head = slice(first, first + head_channels)
            weights = (q[i][:, head] @ k[i][mask[i], head].T / head_channels**0.5).softmax(dim=1)
            heads.append(weights @ v[i][mask[i], head])
        expected = x[i] + attention.proj(torch.cat(heads, dim=1)).T.view(8, 2, 3)
        torch.testing.assert_close(got[i], expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_token_states_and_pooled_embedding_change_the_output():
    network, text = randomize_zero_layers(unet()), random_text([2, 5, 1])
    out = network(X, NOISE, text=text)
    for other in (
        text._replace(pooled=-text.pooled),
        text._replace(tokens=-text.tokens),
        text._replace(mask=text.mask.roll(1, 0)),
        None,
    ):
        assert (network(X, NOISE, text=other) - out).abs().flatten(1).amax(1).min() > 1e-4
    shorter = text._replace(mask=text.mask & (torch.arange(5) < 1))
    assert torch.equal(network(X, NOISE, text=shorter)[2], out[2])  # rows do not mix


@torch.no_grad()
def test_the_scale_of_a_text_encoder_does_not_matter():
    network, text = randomize_zero_layers(unet()), random_text([2, 5, 1])
    scaled = TextStates(30 * text.tokens, text.mask, 30 * text.pooled)
    torch.testing.assert_close(network(X, NOISE, text=scaled), network(X, NOISE, text=text), atol=1e-4, rtol=0)


@torch.no_grad()
def test_padded_tokens_change_nothing():
    network, text = randomize_zero_layers(unet()), random_text([2, 5, 0])
    out = network(X, NOISE, text=text)
    other = torch.where(text.mask[:, :, None], text.tokens, 1e3)
    torch.testing.assert_close(network(X, NOISE, text=text._replace(tokens=other)), out, atol=1e-6, rtol=0)
    torch.testing.assert_close(network(X, NOISE, text=text.pad(9)), out, atol=1e-5, rtol=0)


@torch.no_grad()
def test_no_text_equals_dropped_text():
    network, text = randomize_zero_layers(unet()), random_text([2, 5, 1])
    dropped = network(X, NOISE, text=text.drop(torch.tensor([True, False, True])))
    without, with_text = network(X, NOISE), network(X, NOISE, text=text)
    torch.testing.assert_close(dropped[[0, 2]], without[[0, 2]], atol=1e-5, rtol=0)
    torch.testing.assert_close(dropped[1], with_text[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(network(X, NOISE, text=no_text(3, 6)), without, atol=0, rtol=0)


@torch.no_grad()
def test_half_precision_text_is_computed_with_in_single_precision():
    network, text = randomize_zero_layers(unet()), random_text([2, 5, 1])
    half = TextStates(text.tokens.half(), text.mask, text.pooled.half())
    single = TextStates(half.tokens.float(), half.mask, half.pooled.float())
    assert torch.equal(network(X, NOISE, text=half), network(X, NOISE, text=single))


@torch.no_grad()
def test_mixed_precision_stays_close():
    denoise = EDMPreconditioner(randomize_zero_layers(unet(channels=16)))
    sigma, text = torch.tensor([0.3, 3.0, 1.0]), random_text([2, 0, 5])
    single = denoise(X, sigma, text=text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = denoise(X, sigma, text=text)
    assert 0 < (mixed - single).norm() / single.norm() < 0.02


@torch.no_grad()
def test_memory_layout_does_not_change_the_output():
    plain, text = randomize_zero_layers(unet()), random_text([2, 0, 5])
    interleaved = unet(channels_last=True)
    interleaved.load_state_dict(plain.state_dict())
    torch.testing.assert_close(interleaved(X, NOISE, text=text), plain(X, NOISE, text=text), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_reach_every_parameter_and_lie_as_it_does(channels_last):
    network = randomize_zero_layers(unet(num_classes=2, channels_last=channels_last))
    network(X, NOISE, torch.tensor([0, 1, -1]), text=random_text([2, 0, 5])).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert parameter.grad.stride() == parameter.stride(), name


def test_checkpointing_changes_no_gradient():
    plain = randomize_zero_layers(unet(dropout=0.3)).train()
    saving = unet(dropout=0.3, checkpoint_levels=(0, 1)).train()
    saving.load_state_dict(plain.state_dict())
    text = random_text([2, 0, 5])
    for network in (plain, saving):
        torch.manual_seed(0)
        network(X, NOISE, text=text).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, msg=name)


@torch.no_grad()
def test_weights_are_restored_from_a_state_dict():
    network, text = randomize_zero_layers(unet()), random_text([2, 0, 5])
    other = unet().eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(X, NOISE, text=text), network(X, NOISE, text=text))


def test_text_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"network has none \(context_dim=0\)"):
        unet(0)(X, NOISE, text=random_text([1, 1, 1]))
    with pytest.raises(ValueError, match="text has 2 rows: must have 3"):
        unet()(X, NOISE, text=random_text([1, 1]))
    with pytest.raises(ValueError, match="token states of 4 channels: must be 6"):
        unet()(X, NOISE, text=random_text([1, 1, 1], dim=4))
    with pytest.raises(ValueError, match=r"^context_dim=-1: must lie between 0 and"):
        unet(-1)


class Recorder:
    """Denoiser that returns zeros and keeps class and text."""

    def __call__(self, x, sigma, labels, text):  # noqa: ARG002
        self.labels, self.text = labels, text
        return torch.zeros_like(x)


def test_indices_of_images_become_their_class_and_text():
    text, recorder = random_text([2, 0, 5]), Recorder()
    Prompted(recorder, Prompts(torch.tensor([7, -1, 4]), text))(X, NOISE, torch.tensor([2, -1, 0]))
    assert recorder.labels.tolist() == [4, -1, 7]
    expected = concatenate([text.select([2]), no_text(1, 6), text.select([0])])
    for got, part in zip(recorder.text, expected, strict=True):
        assert torch.equal(got, part)
    Prompted(recorder, Prompts(None, text))(X, NOISE, None)
    assert recorder.labels is None
    assert not recorder.text.mask.any()


def test_the_negative_prompt_replaces_no_text():
    """In any order of images: tiles are batches of parts of several images."""
    text, negative, recorder = random_text([2, 0, 5]), random_text([3], tokens=3), Recorder()
    prompted = Prompted(recorder, Prompts(torch.tensor([7, 8, 4]), text, negative))
    prompted(X.repeat(2, 1, 1, 1), NOISE.repeat(2), torch.tensor([2, 0, -1, 1, -1, -1]))
    assert recorder.labels.tolist() == [4, 7, -1, 8, -1, -1]
    expected = concatenate([text, negative]).select([2, 0, 3, 1, 3, 3])
    for got, part in zip(recorder.text, expected, strict=True):
        assert torch.equal(got, part)
