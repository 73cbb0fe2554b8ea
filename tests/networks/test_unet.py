"""The UNet: sizes, labels, initial state, gradients, precision."""

import pytest
import torch

from relay_diffusion.networks import Condition, EDMPreconditioner, UNet, ops
from relay_diffusion.networks import layers as blocks
from relay_diffusion.networks.layers import ResidualBlock, SelfAttention
from zero_layers import randomize_zero_layers

NOISE = torch.tensor([-0.7, 0.4])


def unet(resolution=8, channels=8, channel_mult=(1, 2), blocks=1, attention_resolutions=(), **options):
    return UNet(
        resolution,
        channels=channels,
        channel_mult=channel_mult,
        blocks=blocks,
        attention_resolutions=attention_resolutions,
        **options,
    )


def x_of(network, batch=2):
    return torch.randn(batch, network.image_channels, network.resolution, network.resolution)


@pytest.mark.parametrize("channels", [20, 36, 48, 50])
@torch.no_grad()
def test_any_even_number_of_channels_runs(channels):
    network = randomize_zero_layers(unet(channels=channels))
    out = network(x_of(network), NOISE)
    assert out.shape == (2, 3, 8, 8)
    assert out.isfinite().all()


@pytest.mark.parametrize(("resolution", "channel_mult"), [(12, (1, 1, 2)), (24, (1, 2, 1, 1)), (5, (1,)), (6, (1, 2))])
@torch.no_grad()
def test_any_resolution_that_halves_often_enough_runs(resolution, channel_mult):
    network = randomize_zero_layers(unet(resolution, 4, channel_mult))
    assert network(x_of(network), NOISE).shape == (2, 3, resolution, resolution)


@pytest.mark.parametrize(("resolution", "levels"), [(10, 3), (12, 4), (7, 2)])
def test_a_resolution_that_does_not_halve_often_enough_is_refused(resolution, levels):
    with pytest.raises(ValueError, match=rf"resolution={resolution}: not divisible by 2\^{levels - 1}"):
        unet(resolution, 4, (1,) * levels)


@pytest.mark.parametrize("resolution", [[10, 12], [12, 10]])
def test_both_sides_must_halve_often_enough(resolution):
    with pytest.raises(ValueError, match=rf"resolution=\[{resolution[0]}, {resolution[1]}\]: not divisible by 2\^2"):
        unet(resolution, 4, (1, 1, 1))


@torch.no_grad()
def test_a_network_runs_on_other_sizes_than_that_of_training():
    """Attention stays at its levels, so a network of another resolution with the same levels is the same function."""
    square = randomize_zero_layers(unet(16, channel_mult=(1, 1, 2), attention_resolutions=(8,)))
    wide = unet([24, 32], channel_mult=(1, 1, 2), attention_resolutions=(12,))
    assert (square.resolution, wide.resolution, wide.size) == (16, [24, 32], (24, 32))
    wide.load_state_dict(square.state_dict())
    x = torch.randn(2, 3, 24, 32)
    out = square(x, NOISE)
    assert out.shape == x.shape
    assert torch.equal(wide(x, NOISE), out)
    with pytest.raises(ValueError, match=r"^x has shape \(2, 3, 24, 30\): height and width must be divisible by 4$"):
        square(x[..., :30], NOISE)


@torch.no_grad()
def test_height_and_width_are_treated_alike():
    """With transposed kernels, a transposed image gives the transposed output."""
    network = randomize_zero_layers(unet([8, 12], channel_mult=(1, 2), attention_resolutions=(4,)))
    x = torch.randn(2, 3, 8, 12)
    out = network(x, NOISE)
    for weight in network.parameters():
        if weight.ndim == 4:
            weight.copy_(weight.mT.clone())
    torch.testing.assert_close(network(x.mT, NOISE), out.mT)


def test_an_odd_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="channels=5: must be even"):
        unet(channels=5)


@pytest.mark.parametrize("image_channels", [1, 4])
@torch.no_grad()
def test_images_may_have_any_number_of_channels(image_channels):
    network = randomize_zero_layers(unet(image_channels=image_channels))
    assert network(x_of(network), NOISE).shape == (2, image_channels, 8, 8)


@pytest.mark.parametrize(("attention_resolutions", "count"), [((), 1), ((16,), 4), ((8,), 4), ((16, 8), 7), ((4,), 1)])
def test_attention_sits_at_its_resolutions_and_at_the_bottom(attention_resolutions, count):
    network = unet(16, 4, (1, 2), 1, attention_resolutions)  # a level has 1 encoder and 2 decoder blocks
    assert sum(isinstance(module, SelfAttention) for module in network.modules()) == count


@torch.no_grad()
def test_decoder_takes_the_encoder_outputs_in_reverse_order():
    network = randomize_zero_layers(unet(channel_mult=(1, 2, 2)))
    kept, joined = [], []
    for module in (network.conv_in, *network.encoder):
        module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    for module, joins in zip(network.decoder, network.joins, strict=True):
        if joins:
            module.register_forward_pre_hook(lambda _module, inputs: joined.append(inputs[2]))
    network(x_of(network), NOISE)
    for output, join in zip(reversed(kept), joined, strict=True):
        assert torch.equal(join, output)


@torch.no_grad()
def test_no_class_is_the_same_as_no_labels():
    network = randomize_zero_layers(unet(num_classes=5))
    x = x_of(network)
    torch.testing.assert_close(network(x, NOISE, torch.tensor([-1, -1])), network(x, NOISE), atol=0, rtol=0)


@torch.no_grad()
def test_images_with_and_without_a_class_may_share_a_batch():
    network = randomize_zero_layers(unet(num_classes=5))
    x = x_of(network)
    mixed = network(x, NOISE, torch.tensor([-1, 3]))
    torch.testing.assert_close(mixed[:1], network(x, NOISE)[:1])
    torch.testing.assert_close(mixed[1:], network(x, NOISE, torch.tensor([3, 3]))[1:])


@torch.no_grad()
def test_every_class_has_its_own_output():
    network = randomize_zero_layers(unet(num_classes=3))
    x = x_of(network, 1).expand(4, -1, -1, -1)
    out = network(x, NOISE[:1].expand(4), torch.tensor([-1, 0, 1, 2]))
    for i in range(4):
        for j in range(i):
            assert (out[i] - out[j]).abs().max() > 1e-3


@torch.no_grad()
def test_the_noise_level_changes_the_output():
    network = randomize_zero_layers(unet())
    out = network(x_of(network, 1).expand(2, -1, -1, -1), NOISE)
    assert (out[0] - out[1]).abs().max() > 1e-3


@torch.no_grad()
def test_augmentation_labels_change_the_output_and_zeros_do_not():
    network = randomize_zero_layers(unet(augment_labels=9))
    x = x_of(network)
    plain = network(x, NOISE)
    torch.testing.assert_close(network(x, NOISE, None, torch.zeros(2, 9)), plain, atol=0, rtol=0)
    assert (network(x, NOISE, None, torch.randn(2, 9)) - plain).abs().max() > 1e-3


@torch.no_grad()
def test_a_condition_and_its_level_change_the_output_of_their_image_alone():
    denoise = EDMPreconditioner(randomize_zero_layers(unet(condition_channels=3)))
    x, sigma, images, level = x_of(denoise.network), torch.ones(2), torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.1])
    before = denoise(x, sigma, condition=Condition(images, level))
    first = torch.tensor([1.0, 0.0])
    changed = Condition(images + first[:, None, None, None], level), Condition(images, level + 0.3 * first)
    for condition in changed:
        after = denoise(x, sigma, condition=condition)
        assert (after[0] - before[0]).abs().max() > 1e-3
        torch.testing.assert_close(after[1], before[1])


@pytest.mark.parametrize("channels", [3, 6, 7])
def test_the_first_convolution_of_eight_channels_is_that_of_fewer(monkeypatch, channels):
    """The path of a GPU, computed on the CPU."""
    monkeypatch.setattr(ops, "fusible", lambda *_: True)
    conv, x = torch.nn.Conv2d(channels, 4, 3, padding=1), torch.randn(2, channels, 8, 8)
    torch.testing.assert_close(ops.convolve_image(conv, x), conv(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_of_a_batch_do_not_mix():
    network = randomize_zero_layers(unet(num_classes=5, attention_resolutions=(8, 4)))
    x, labels = x_of(network), torch.tensor([1, 4])
    apart = torch.cat([network(x[i : i + 1], NOISE[i : i + 1], labels[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(network(x, NOISE, labels), apart)


def test_a_new_network_returns_zero():
    network = unet(num_classes=5)
    assert not network(x_of(network), NOISE, torch.tensor([0, 4])).any()


def test_a_new_denoiser_is_the_skip_alone():
    denoise, sigma = EDMPreconditioner(unet()), torch.tensor([0.5, 2.0])
    x = x_of(denoise.network)
    expected = torch.cat([x[:1] / 2, x[1:] / 17])  # 0.25 / (0.25 + sigma^2)
    torch.testing.assert_close(denoise(x, sigma), expected)


@torch.no_grad()
def test_dropout_acts_in_training_only():
    network = randomize_zero_layers(unet(dropout=0.5))
    x = x_of(network)
    assert torch.equal(network(x, NOISE), network(x, NOISE))
    network.train()
    assert (network(x, NOISE) - network(x, NOISE)).abs().max() > 1e-3


def test_every_residual_block_has_the_dropout():
    blocks = [module for module in unet(dropout=0.25).modules() if isinstance(module, ResidualBlock)]
    assert {block.dropout for block in blocks} == {0.25}


@torch.no_grad()
def test_training_without_dropout_equals_evaluation():
    network = randomize_zero_layers(unet())
    x = x_of(network)
    expected = network(x, NOISE)
    assert torch.equal(network.train()(x, NOISE), expected)


def test_gradients_reach_every_parameter():
    options = {"num_classes": 2, "augment_labels": 9, "condition_channels": 3}
    network = randomize_zero_layers(unet(channel_mult=(1, 2, 2), attention_resolutions=(4,), **options))
    condition = Condition(torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([0.1, 0.4]))
    x, sigma, labels = x_of(network), torch.tensor([0.3, 1.0]), torch.tensor([0, 1])
    EDMPreconditioner(network)(x, sigma, labels, torch.randn(2, 9), condition).square().sum().backward()
    assert (condition.images.grad.flatten(1).abs().sum(1) > 0).all()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@torch.no_grad()
def test_mixed_precision_stays_close():
    denoise = EDMPreconditioner(randomize_zero_layers(unet(channels=16, attention_resolutions=(8,), num_classes=3)))
    x, sigma, labels = x_of(denoise.network), torch.tensor([0.3, 3.0]), torch.tensor([2, -1])
    single = denoise(x, sigma, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = denoise(x, sigma, labels)
    error = (mixed - single).norm() / single.norm()
    assert mixed.dtype == torch.float32
    assert 0 < error < 0.02


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_memory_layout_of_the_images_does_not_change_the_output(channels_last):
    network = randomize_zero_layers(unet(channels=16, attention_resolutions=(8,), channels_last=channels_last))
    x = x_of(network)
    interleaved = network(x.to(memory_format=torch.channels_last), NOISE)
    torch.testing.assert_close(interleaved, network(x, NOISE), atol=1e-5, rtol=0)


@torch.no_grad()
def test_memory_layout_of_the_network_does_not_change_the_output():
    plain = randomize_zero_layers(unet(channels=16, attention_resolutions=(8,)))
    interleaved = unet(channels=16, attention_resolutions=(8,), channels_last=True)
    interleaved.load_state_dict(plain.state_dict())
    x = x_of(plain)
    torch.testing.assert_close(interleaved(x, NOISE), plain(x, NOISE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_weights_and_activations_have_the_memory_layout_asked_for(channels_last):
    network = unet(channels_last=channels_last)
    layouts = [torch.contiguous_format, torch.channels_last]
    expected = layouts[channels_last]
    assert network.conv_out.weight.is_contiguous(memory_format=expected)
    for given in layouts:  # whatever the layout of the images
        out = network(x_of(network).contiguous(memory_format=given), NOISE)
        assert out.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("levels", [(0,), (1,), (0, 1, 2)])
def test_checkpointing_changes_no_gradient(levels):
    """Also with dropout, whose mask must be the same in the recomputation."""
    plain = randomize_zero_layers(unet(channel_mult=(1, 2, 2), dropout=0.3)).train()
    saving = randomize_zero_layers(unet(channel_mult=(1, 2, 2), dropout=0.3, checkpoint_levels=levels)).train()
    saving.load_state_dict(plain.state_dict())
    for network in (plain, saving):
        torch.manual_seed(0)
        network(x_of(network), NOISE).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_checkpointed_blocks_keep_nothing_but_their_input():
    """Counts the saved tensors: all without checkpointing, only the input with it."""
    kept = {}
    for levels in ((), (0, 1)):
        network, saved = randomize_zero_layers(unet(channel_mult=(1, 2), checkpoint_levels=levels)).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            network(x_of(network), NOISE)
        kept[levels] = sum(saved)
    assert kept[(0, 1)] < kept[()] / 2


def test_blocks_are_computed_again_in_training_only(monkeypatch):
    calls = []
    monkeypatch.setattr(blocks, "checkpoint", lambda function, *args, **_: calls.append(args) or function(*args))
    network = randomize_zero_layers(unet(channel_mult=(1, 2), checkpoint_levels=(1,)))
    network.eval()(x_of(network), NOISE)
    assert not calls
    network.train()(x_of(network), NOISE)
    assert len(calls) == sum(block.checkpointed for block in network.modules() if isinstance(block, ResidualBlock))


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_lie_as_their_weights_do(channels_last):
    """DDP would copy other layouts, and warn."""
    network = randomize_zero_layers(unet(channel_mult=(1, 2), channels_last=channels_last))
    network(x_of(network), NOISE).square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range_is_refused(dropout):
    with pytest.raises(ValueError, match=f"dropout={dropout}: "):
        unet(dropout=dropout)


def test_levels_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"checkpoint_levels=\[3\]: the levels are 0 to 1"):
        unet(channel_mult=(1, 2), checkpoint_levels=(3,))


@pytest.mark.parametrize(
    "setting",
    [
        {"resolution": 0}, {"channels": 2**14 + 2}, {"blocks": 0}, {"blocks": 101}, {"num_classes": -1},
        {"augment_labels": 1025}, {"condition_channels": -1}, {"channel_mult": []}, {"channel_mult": [1, 65]},
    ],
)  # fmt: skip
def test_sizes_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"^{next(iter(setting))}="):
        UNet(**({"resolution": 8} | setting))
