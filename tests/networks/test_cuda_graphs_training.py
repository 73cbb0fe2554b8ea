"""CUDA graphs in training; without a GPU the denoiser is called directly."""

import pytest
import torch

from relay_diffusion.networks import Condition, EDMPreconditioner, GraphedTraining, UNet
from relay_diffusion.networks.cuda_graphs import _apart
from text_rows import random_text
from zero_layers import randomize_zero_layers

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
BATCH = 4


def denoiser(**options):
    network = UNet(16, channels=16, channel_mult=(1, 2), blocks=1, attention_resolutions=(8,), num_classes=3, **options)
    return randomize_zero_layers(EDMPreconditioner(network)).train()


def step_inputs(device, batch=BATCH, **given):
    x = torch.randn(batch, 3, 16, 16, device=device)
    return {"x": x, "sigma": torch.rand(batch) + 0.1, "labels": torch.arange(batch, device=device) % 3} | given


def gradients(module, call, inputs, precision=None):
    """Compute output and gradients of a loss from a fixed random state."""
    module.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cuda", precision, enabled=precision is not None):
        output = call(**inputs)
    output.square().sum().backward()
    return output.detach(), [p.grad.clone() for p in module.parameters()]


def assert_close(got, expected, tolerance):  # convolutions of float32 may round to TF32
    assert torch.equal(got[0], expected[0])
    scale = max(float(gradient.abs().max()) for gradient in expected[1])
    for mine, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * scale)


def test_without_a_gpu_it_is_the_denoiser():
    plain = denoiser()
    inputs = step_inputs("cpu")
    assert_close(gradients(plain, GraphedTraining(plain), inputs), gradients(plain, plain, inputs), 0)


def test_without_a_gpu_text_reaches_the_denoiser():
    plain = denoiser(context_dim=6)
    inputs = step_inputs("cpu", text=random_text([2, 0, 5, 1]))
    assert_close(gradients(plain, GraphedTraining(plain), inputs), gradients(plain, plain, inputs), 0)


@needs_gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_text_is_replayed(precision, channels_last):
    plain = denoiser(dropout=0.2, channels_last=channels_last, context_dim=6).cuda()
    graphed = GraphedTraining(plain)
    for tokens in (5, 5, 8, 5):  # another number of tokens is another shape
        inputs = step_inputs("cuda", text=random_text([tokens, 0, 2, 1], tokens=tokens).to("cuda"))
        expected = gradients(plain, plain, inputs, precision)
        got = gradients(plain, graphed, inputs, precision)
        assert_close(got, expected, 1e-3 if precision is None else 1e-2)


@needs_gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_replays_equal_direct_calls(precision, dropout, channels_last):
    plain = denoiser(dropout=dropout, channels_last=channels_last).cuda()
    graphed = GraphedTraining(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-4)
    for _ in range(4):  # weights change between replays
        inputs = step_inputs("cuda")
        expected = gradients(plain, plain, inputs, precision)
        got = gradients(plain, graphed, inputs, precision)
        assert_close(got, expected, 1e-3 if precision is None else 1e-2)
        optimizer.step()


@needs_gpu
def test_all_inputs_of_a_network_are_replayed():
    plain = denoiser(augment_labels=2, condition_channels=3).cuda()
    graphed = GraphedTraining(plain)
    for _ in range(3):
        condition = Condition(torch.randn(BATCH, 3, 16, 16).cuda(), torch.rand(BATCH) + 0.1)
        inputs = step_inputs("cuda", augment_labels=torch.randn(BATCH, 2).cuda(), condition=condition)
        assert_close(gradients(plain, graphed, inputs), gradients(plain, plain, inputs), 1e-3)


@needs_gpu
def test_gradients_of_micro_batches_accumulate():
    plain = denoiser(channels_last=True).cuda()
    graphed = GraphedTraining(plain)
    parts = [step_inputs("cuda") for _ in range(3)]
    sums = []
    for call in (graphed, plain):
        plain.zero_grad()
        for part in parts:
            call(**part).square().sum().backward()
        sums.append([p.grad.clone() for p in plain.parameters()])
    scale = max(float(gradient.abs().max()) for gradient in sums[1])
    for mine, theirs in zip(*sums, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 * scale)


@needs_gpu
def test_the_capture_draws_no_random_numbers_and_leaves_no_gradients():
    plain = denoiser(dropout=0.2).cuda()
    graphed, inputs = GraphedTraining(plain), step_inputs("cuda")
    torch.manual_seed(1)
    with torch.no_grad():
        plain(**inputs)
    after_a_call = torch.randn(8, device="cuda")
    for _ in range(3):
        torch.manual_seed(1)
        graphed(**inputs)
        assert torch.equal(torch.randn(8, device="cuda"), after_a_call)
    assert all(p.grad is None for p in plain.parameters())


@needs_gpu
def test_another_batch_size_is_captured_again():
    plain = denoiser(channels_last=True).cuda()
    graphed = GraphedTraining(plain)
    for batch in (4, 4, 2, 4):
        inputs = step_inputs("cuda", batch)
        assert_close(gradients(plain, graphed, inputs), gradients(plain, plain, inputs), 1e-3)


@needs_gpu
def test_activation_checkpointing_calls_the_denoiser():
    plain = denoiser(checkpoint_levels=[0]).cuda()
    graphed, inputs = GraphedTraining(plain), step_inputs("cuda")
    assert_close(gradients(plain, graphed, inputs), gradients(plain, plain, inputs), 1e-3)
    assert graphed._captured is None


@needs_gpu
def test_a_gradient_after_another_evaluation_is_refused():
    graphed = GraphedTraining(denoiser().cuda())
    first = graphed(**step_inputs("cuda"))
    graphed(**step_inputs("cuda"))
    with pytest.raises(RuntimeError, match=r"stage\.cuda_graphs=false"):
        first.sum().backward()


@needs_gpu
def test_a_second_gradient_is_refused():
    graphed = GraphedTraining(denoiser().cuda())
    output = graphed(**step_inputs("cuda")).sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one gradient"):
        output.backward()


@needs_gpu
def test_no_two_weights_share_the_memory_of_their_gradients():
    """A loss scaler divides each of them in place."""
    plain = denoiser(channels_last=True).cuda()
    GraphedTraining(plain)(**step_inputs("cuda")).sum().backward()
    places = [p.grad.data_ptr() for p in plain.parameters()]
    assert len(set(places)) == len(places)


def test_gradients_that_share_memory_are_taken_apart():
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    shared = torch.autograd.grad((a + b).sum(), [a, b])
    assert len({gradient.data_ptr() for gradient in shared}) == 1  # the case under test
    apart = _apart([*shared, None])
    assert len({gradient.data_ptr() for gradient in apart[:2]}) == 2
    assert apart[2] is None
    assert all(torch.equal(gradient, torch.ones(3)) for gradient in apart[:2])
