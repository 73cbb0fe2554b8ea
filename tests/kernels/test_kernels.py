"""Fused kernels against the same steps in plain torch and float64.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py asks for it).
"""

import copy

import pytest
import torch
from torch import nn

from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.networks import UNet, ops
from support import TRITON
from zero_layers import randomize_zero_layers

pytest.importorskip("triton", TRITON)
from relay_diffusion.kernels import autograd as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def use_kernels(monkeypatch):
    """Use the kernels for every dtype but float64, also on the CPU."""
    monkeypatch.setattr(ops, "on_gpu", lambda _: True)
    monkeypatch.setattr(fused, "ROWS", 96)  # several programs and a partial one, on small images too
    monkeypatch.setattr(fused, "SUM_ROWS", 64)
    if DEVICE == "cuda":  # no TF32
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def image(*shape, dtype=torch.float32, mean=0.0):
    x = torch.randn(*shape, device=DEVICE) * 2 + mean
    return x.to(dtype).to(memory_format=torch.channels_last).requires_grad_()


def double(x):
    return None if x is None else x.detach().double().requires_grad_()


def close(got, expected, tolerance):
    """Compare by the norm of the difference, because single elements of a sum may cancel."""
    assert got.shape == expected.shape
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error < tolerance, f"relative error {error:.2e}"


def with_weights(module, weight, bias):
    """Replace the parameters of a module by these tensors, which need not be leaves."""
    copied = copy.copy(module)
    copied._parameters = {"weight": weight, "bias": bias}
    return copied


def compare(call, arguments, tolerance):
    """Compare outputs and gradients of call(*arguments) with those in float64."""
    references = [double(x) for x in arguments]
    outputs, expected = call(*arguments), call(*references)
    compared = [(a, b) for a, b in zip(outputs, expected, strict=True) if b is not None]
    weights = [torch.randn_like(a) for a, _ in compared]
    sum((a * w).sum() for (a, _), w in zip(compared, weights, strict=True)).backward()
    sum((b * w.double()).sum() for (_, b), w in zip(compared, weights, strict=True)).backward()
    for a, b in compared:
        close(a, b, tolerance)
    for argument, reference in zip(arguments, references, strict=True):
        if argument is not None:
            close(argument.grad, reference.grad, 2 * tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("use_kernels")
@pytest.mark.parametrize(
    ("channels", "skip", "groups", "down", "modulated", "dtype"),
    [
        (8, 0, 2, False, False, torch.float32),
        (128, 0, 32, True, False, torch.float32),
        (72, 24, 32, False, False, torch.float32),
        *(
            (*shape, True, dtype)
            for shape in ((48, 0, 8, True), (80, 0, 5, False), (72, 24, 32, False))
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_fused_normalization_equals_plain_torch(channels, skip, groups, down, modulated, dtype):
    total, batch, height, width = channels + skip, 2, 10, 14
    x, s = image(batch, channels, height, width, dtype=dtype), image(batch, skip, height, width, dtype=dtype)
    parameters = [torch.randn(total, device=DEVICE, requires_grad=True) for _ in range(2 + (not skip))]
    modulation = (torch.randn(batch, 2 * total, device=DEVICE) / 3).requires_grad_() if modulated else None

    def call(x, s, weight, shift, modulation, bias=None):
        norm = with_weights(nn.GroupNorm(groups, total), weight, shift)
        return ops.norm_act(x, norm, s, bias, modulation, silu=modulated or down, down=down)

    arguments = [x, s if skip else None, parameters[0], parameters[1], modulation]
    compare(call, [*arguments, parameters[2]] if not skip else arguments, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.usefixtures("use_kernels")
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_addition_equals_plain_torch(up, biased, dtype):
    hidden = image(2, 24, 12, 10, dtype=dtype)
    shortcut = image(2, 24, 6, 5, dtype=dtype) if up else image(2, 24, 12, 10, dtype=dtype)
    bias = torch.randn(24, device=DEVICE, requires_grad=True) if biased else None
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    compare(lambda h, s, b: (ops.add(h, s, b, up),), [hidden, shortcut, bias], tolerance)


@pytest.mark.usefixtures("use_kernels")
def test_unsupported_tensors_use_plain_torch():
    x = torch.randn(2, 16, 6, 6, device=DEVICE).to(memory_format=torch.channels_last)
    assert ops.fusible(x, None, x)
    assert ops.fusible(x.bfloat16(), x.bfloat16())
    assert not ops.fusible(x, x.bfloat16())
    assert not ops.fusible(x.double())
    assert not ops.fusible(x.contiguous())
    assert not ops.fusible(x, x.contiguous())
    assert ops.add(x.bfloat16(), x).dtype == torch.float32


@pytest.mark.usefixtures("use_kernels")
def test_a_large_mean_loses_no_precision():
    x = image(2, 16, 20, 20, mean=3000.0)
    norm = nn.GroupNorm(4, 16).to(DEVICE)
    h, _, _ = ops.norm_act(x, norm, silu=False)
    expected = nn.GroupNorm(4, 16).double().to(DEVICE)(x.detach().double())
    close(h, expected, 3e-4)  # squared values of 3000 would lose all precision
    small = image(2, 16, 20, 20)
    total = ops.add(x, small)  # the addition also computes the moments
    h, _, _ = ops.norm_act(total, norm, silu=False)
    close(h, nn.GroupNorm(4, 16).double().to(DEVICE)(total.detach().double()), 3e-4)


@pytest.mark.usefixtures("use_kernels")
def test_moments_are_cached_until_the_tensor_changes(monkeypatch):
    measured = []
    monkeypatch.setattr(fused, "measure", lambda x, measure=fused.measure: measured.append(x) or measure(x))
    norm, shortcut = nn.GroupNorm(4, 16).to(DEVICE), image(2, 16, 6, 6).detach()
    with torch.no_grad():
        x = ops.add(image(2, 16, 6, 6), shortcut)
        ops.norm_act(x, norm)
        assert not measured  # they came from the addition
        ops.norm_act(shortcut, norm)
        ops.norm_act(shortcut, norm)
        assert len(measured) == 1
        for y in (x, shortcut):
            y.mul_(2).add_(1)
            h, _, _ = ops.norm_act(y, norm, silu=False)
            close(h, nn.GroupNorm(4, 16).double().to(DEVICE)(y.double()), 1e-5)
    assert len(measured) == 3


@pytest.mark.usefixtures("use_kernels")
@pytest.mark.parametrize("options", [{"down": False}, {"down": True}])
def test_gradients_where_only_the_shortcut_is_used(options):
    x, norm = image(2, 16, 6, 6), nn.GroupNorm(4, 16).to(DEVICE)
    ops.norm_act(x, norm, **options)[1].sum().backward()
    expected = 0.25 if options["down"] else 1.0
    torch.testing.assert_close(x.grad, torch.full_like(x, expected))
    assert not norm.weight.grad.any()


@pytest.mark.usefixtures("use_kernels")
def test_one_modulation_is_broadcast_to_all_samples():
    x, norm = image(3, 16, 6, 6), nn.GroupNorm(4, 16).to(DEVICE)
    modulation = torch.randn(1, 32, device=DEVICE, requires_grad=True)
    compare(
        lambda x, m, weight, bias: ops.norm_act(x, with_weights(norm, weight, bias), modulation=m)[:1],
        [x, modulation, norm.weight, norm.bias],
        1e-5,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("use_kernels")
def test_dropout_masks_are_independent_and_match_the_gradient():
    torch.manual_seed(0)
    rate = 0.2
    x, norm = image(2, 32, 16, 18), nn.GroupNorm(8, 32).to(DEVICE)
    plain, _, _ = ops.norm_act(x, norm)
    torch.manual_seed(1)
    first, _, _ = ops.norm_act(x, norm, dropout=rate)
    torch.manual_seed(1)
    again, _, _ = ops.norm_act(x, norm, dropout=rate)
    other, _, _ = ops.norm_act(x, norm, dropout=rate)
    assert torch.equal(first, again)
    kept = first != 0
    torch.testing.assert_close(first[kept], plain[kept] / (1 - rate), rtol=1e-5, atol=1e-6)
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs((~kept).float().mean() - rate) < 5 * deviation
    # masks of different calls, samples, channels and pixels are independent
    mask = (~kept).float() - rate
    shifted = {
        "call": (mask, (other == 0).float() - rate),
        "sample": (mask[1:], mask[:-1]),
        "channel": (mask[:, 1:], mask[:, :-1]),
        "pixel": (mask[..., 1:], mask[..., :-1]),
        "row": (mask[:, :, 1:], mask[:, :, :-1]),
        "power of two": (mask.permute(0, 2, 3, 1).flatten()[2**13 :], mask.permute(0, 2, 3, 1).flatten()[: -(2**13)]),
    }
    for name, (a, b) in shifted.items():
        correlation = (a * b).mean() / (rate * (1 - rate))
        assert abs(correlation) < 5 / a.numel() ** 0.5, name
    # the gradient is dropped where the value was
    gradient = torch.zeros_like(first)
    gradient[0, 0] = torch.randn_like(gradient[0, 0])
    (through,) = torch.autograd.grad(first, x, gradient)
    masked = torch.where(kept, gradient / (1 - rate), 0)
    (expected,) = torch.autograd.grad(plain, x, masked)
    close(through, expected.double(), 1e-5)


@pytest.mark.usefixtures("use_kernels")
@pytest.mark.parametrize("channels", [1, 3, 9])
def test_first_convolution_equals_plain_torch(channels):
    conv = nn.Conv2d(channels, 16, 3, padding=1).to(DEVICE)

    def call(x, weight, bias):
        return (ops.convolve_image(with_weights(conv, weight, bias), x),)

    compare(call, [image(2, channels, 6, 8), conv.weight, conv.bias], 1e-6)


@pytest.mark.usefixtures("use_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_key_value_equals_plain_torch(dtype):
    conv = nn.Conv2d(8, 24, 1).to(DEVICE)

    def call(x, weight, bias):
        return ops.query_key_value(with_weights(conv, weight, bias), x)

    compare(call, [image(2, 8, 24, 16, dtype=dtype), conv.weight, conv.bias], 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.usefixtures("use_kernels")
@pytest.mark.parametrize("skip", [0, 12])
def test_projection_equals_plain_torch(skip):
    conv = nn.Conv2d(8 + skip, 16, 1).to(DEVICE)

    def call(x, s, weight, bias, extra):
        return (ops.project(with_weights(conv, weight, bias), x, s, extra),)

    extra = torch.randn(16, device=DEVICE, requires_grad=True)
    compare(call, [image(2, 8, 4, 6), image(2, 12, 4, 6) if skip else None, conv.weight, conv.bias, extra], 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("use_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_and_its_gradients_equal_plain_torch(dtype):
    options = {"channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (), "num_classes": 3}
    options |= {"context_dim": 6}
    network = randomize_zero_layers(UNet(8, **options, augment_labels=2, channels_last=True)).to(DEVICE)
    reference = randomize_zero_layers(UNet(8, **options, augment_labels=2)).double().to(DEVICE)
    reference.load_state_dict({name: value.double() for name, value in network.state_dict().items()})
    # Drawn on the CPU: each device sees the same numbers. With others, some gradients nearly cancel, and plain torch in
    # bf16 has errors of up to 0.24 too.
    x, noise = torch.randn(2, 3, 8, 8).to(DEVICE), torch.randn(2).to(DEVICE)
    labels, augment = torch.tensor([2, -1], device=DEVICE), torch.randn(2, 2).to(DEVICE)
    mask = torch.tensor([[True, True, False], [False] * 3])
    text = TextStates(torch.randn(2, 3, 6), mask, torch.randn(2, 6)).to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        got = network(x, noise, labels, augment, text=text)
    expected = reference(x.double(), noise.double(), labels, augment.double(), text=text)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    close(got, expected, tolerance)
    weight = torch.randn(expected.shape).to(expected)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, parameter), other in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert parameter.grad.stride() == parameter.stride(), name  # DDP would copy, and warn
        error = (parameter.grad.double() - other.grad).norm() / other.grad.norm().clamp(min=1e-12)
        assert error < (1e-4 if dtype == torch.float32 else 0.1), f"{name}: {error:.2e}"


@pytest.mark.usefixtures("use_kernels")
def test_gradients_of_the_shortcut_are_added():
    """The input is used twice: by the normalization and by the shortcut."""
    x, norm = image(2, 16, 6, 6), nn.GroupNorm(4, 16).to(DEVICE)
    h, shortcut, _ = ops.norm_act(x, norm)
    (h.sum() + (shortcut * 3).sum()).backward()
    y = x.detach().clone().requires_grad_()
    (torch.nn.functional.silu(norm(y)).sum() + 3 * y.sum()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
