"""CUDA graphs in sampling; without a GPU the denoiser is called directly."""

import gc
from contextlib import contextmanager

import pytest
import torch

from relay_diffusion.networks import EDMPreconditioner, Graphed, UNet
from relay_diffusion.networks.cuda_graphs import _capturing
from text_rows import random_text
from zero_layers import randomize_zero_layers

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


def denoiser(**options):
    network = UNet(16, channels=16, channel_mult=(1, 2), blocks=1, attention_resolutions=(8,), num_classes=3, **options)
    return randomize_zero_layers(EDMPreconditioner(network))


def test_without_a_gpu_it_is_the_denoiser():
    plain = denoiser()
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.ones(2), torch.tensor([0, 2])
    graphed = Graphed(plain)
    for _ in range(3):
        assert torch.equal(graphed(x, sigma, labels), plain(x, sigma, labels))


@needs_gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("channels_last", [False, True])
def test_replays_equal_direct_calls(precision, inference, channels_last):
    plain = denoiser(channels_last=channels_last).cuda()
    graphed = Graphed(plain)
    with inference(), torch.autocast("cuda", precision, enabled=precision is not None):
        for step in range(6):
            x, sigma = torch.randn(2, 3, 16, 16).double().cuda(), torch.rand(2).double() + 0.1
            labels = torch.tensor([step % 3, -1]).cuda()
            torch.testing.assert_close(graphed(x, sigma, labels), plain(x, sigma, labels), rtol=0, atol=0)


def test_without_a_gpu_text_reaches_the_denoiser():
    plain, text = denoiser(context_dim=6), random_text([2, 0])
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    expected = plain(x, sigma, text=text)
    assert torch.equal(Graphed(plain)(x, sigma, None, text), expected)
    assert not torch.equal(expected, plain(x, sigma))


@needs_gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("labels", [None, [0, 2]])
@torch.no_grad()
def test_text_is_replayed(precision, channels_last, labels):
    plain = denoiser(channels_last=channels_last, context_dim=6).cuda()
    graphed, labels = Graphed(plain), None if labels is None else torch.tensor(labels).cuda()
    with torch.autocast("cuda", precision, enabled=precision is not None):
        for tokens in (5, 5, 5, 8, 8, 8, 5):  # another number of tokens is another shape
            x, sigma = torch.randn(2, 3, 16, 16).cuda(), torch.rand(2) + 0.1
            text = random_text([tokens, 0], tokens=tokens).to("cuda")
            text = text._replace(tokens=text.tokens.half())  # the type of a text encoder
            got = graphed(x, sigma, labels, text)
            torch.testing.assert_close(got, plain(x, sigma, labels, text=text), rtol=0, atol=0)
            without = graphed(x, sigma, labels)
            torch.testing.assert_close(without, plain(x, sigma, labels), rtol=0, atol=0)
    assert len(graphed._graphs) <= 2


@needs_gpu
@torch.no_grad()
def test_changed_weights_are_used():
    plain = denoiser(channels_last=True).cuda()
    graphed = Graphed(plain)
    x, sigma, labels = torch.randn(2, 3, 16, 16).cuda(), torch.ones(2), torch.tensor([0, 2]).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        before = [graphed(x, sigma, labels) for _ in range(3)][-1]
    for parameter in plain.parameters():
        parameter.mul_(1.1)
    with torch.autocast("cuda", torch.bfloat16):
        after = graphed(x, sigma, labels)
        torch.testing.assert_close(after, plain(x, sigma, labels), rtol=0, atol=0)
    assert not torch.allclose(before, after)


@needs_gpu
@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_graph_serves_evaluations_with_and_without_inference_mode(modes):
    plain = denoiser(channels_last=True).cuda()
    graphed = Graphed(plain)
    x, sigma = torch.randn(2, 3, 16, 16).cuda(), torch.ones(2)
    for mode in (modes[0], modes[0], modes[1], modes[0], modes[1]):
        with mode(), torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(graphed(x, sigma, None), plain(x, sigma, None), rtol=0, atol=0)


@needs_gpu
@torch.no_grad()
def test_weights_in_new_memory_are_used():
    plain = denoiser(channels_last=True).cuda()
    graphed = Graphed(plain)
    x, sigma = torch.randn(2, 3, 16, 16).cuda(), torch.ones(2)
    for _ in range(3):
        graphed(x, sigma, None)
    last = list(plain.parameters())[-1]
    last.data = last.data.clone() + 1
    torch.testing.assert_close(graphed(x, sigma, None), plain(x, sigma, None), rtol=0, atol=0)


@needs_gpu
@torch.no_grad()
def test_at_most_two_batch_sizes_are_kept():
    plain = denoiser(channels_last=True).cuda()
    graphed = Graphed(plain)
    for batch in (1, 2, 1, 2, 1, 2, 3, 3, 3, 1):
        x, sigma, labels = torch.randn(batch, 3, 16, 16).cuda(), torch.ones(batch), torch.zeros(batch).long().cuda()
        torch.testing.assert_close(graphed(x, sigma, labels), plain(x, sigma, labels), rtol=0, atol=0)
    assert len(graphed._graphs) <= 2


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_garbage_is_not_collected_during_a_capture(monkeypatch, error):
    """Freeing an older graph would invalidate the capture."""
    collected = []

    @contextmanager
    def graph(*_, **__):
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    try:
        with _capturing(None):
            collected.append(gc.isenabled())
            if error is not None:
                raise error
    except RuntimeError:
        pass
    assert collected == [False]
    assert gc.isenabled()


@needs_gpu
@torch.no_grad()
def test_an_unused_older_graph_does_not_disturb_a_capture():
    def collect(*_):  # as Python may at any time
        if gc.isenabled():
            gc.collect()

    x, sigma = torch.randn(2, 3, 16, 16).cuda(), torch.ones(2)
    new, old = Graphed(denoiser().cuda()), Graphed(denoiser().cuda())
    for graphed, evaluations in ((new, 1), (old, 3)):
        for _ in range(evaluations):
            graphed(x, sigma, None)
    new.denoiser.register_forward_pre_hook(collect)
    old.itself = old  # only the garbage collector can free it
    del old, graphed
    captured = new(x, sigma, None)
    torch.testing.assert_close(captured, new.denoiser(x, sigma, None), rtol=0, atol=0)
