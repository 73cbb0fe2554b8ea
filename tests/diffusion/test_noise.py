"""Block noise as a linear map of white noise, and one random stream per image."""

import pytest
import torch

from relay_diffusion.diffusion.generators import PerImageGenerator, manual_seed, mix_seeds
from relay_diffusion.diffusion.noise import AHEAD, block_noise
from support import TRITON


def covariance(height, width, block):
    """Exact covariance [HW, HW] of block noise: unit impulses through the linear map L give L L^T."""
    impulses = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    responses = block_noise(impulses, block).flatten(1)
    return responses.T @ responses


def triangle(length, block):
    """max(0, s-|d|)/s of all pairs of positions on a circle: [length, length]."""
    position = torch.arange(length)
    distance = (position[:, None] - position[None, :]).abs()
    distance = torch.minimum(distance, length - distance)
    return (block - distance).clamp(min=0).double() / block


@pytest.mark.parametrize(("height", "width", "block"), [(8, 8, 1), (8, 8, 2), (8, 8, 4), (9, 6, 3), (8, 12, 4)])
def test_covariance_is_a_product_of_triangles(height, width, block):
    expected = torch.kron(triangle(height, block), triangle(width, block))
    torch.testing.assert_close(covariance(height, width, block), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("block", [2, 3, 4, 8])
def test_variance_is_one(block):
    variance = covariance(8, 8, block).diag()
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", range(1, 14))
def test_equals_the_sum_of_circular_shifts(block, dtype):
    white = torch.randn(2, 3, block + block // 2, 14, dtype=dtype)
    before = white.clone()
    shifted = [white.double().roll((i, j), (-2, -1)) for i in range(block) for j in range(block)]
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(block_noise(white, block).double(), sum(shifted) / block, atol=tolerance, rtol=0)
    assert torch.equal(white, before)


def test_block_noise_of_block_one_is_white():
    white = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(block_noise(white, 1), white)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_noise_keeps_the_dtype(dtype):
    assert block_noise(torch.randn(1, 1, 4, 4, dtype=dtype), 2).dtype == dtype


def test_noise_of_an_image_does_not_depend_on_its_batch():
    seeds, like = [5, 3, 8, 1, 9], torch.zeros(5, 3, 8, 8)
    together = PerImageGenerator(seeds)
    draws = [together.randn_like(like) for _ in range(3)]
    for start, stop in [(0, 2), (2, 3), (3, 5)]:
        apart = PerImageGenerator(seeds[start:stop])
        for draw in draws:
            assert torch.equal(apart.randn_like(like[start:stop]), draw[start:stop])


def sequential_draws(seed, shape, draws):
    """Draw float32 noise of a seed from its CPU generator, one image after the other."""
    generator = torch.Generator().manual_seed(mix_seeds(seed, 0))
    return [torch.randn(shape, generator=generator) for _ in range(draws)]


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_a_seed_are_those_of_its_generator_in_sequence(dtype, ahead, monkeypatch):
    """Also when several are drawn at once (for 16 n numbers torch then draws the same ones)."""
    monkeypatch.setitem(AHEAD, "cpu", ahead)
    source, like = PerImageGenerator([5, 3]), torch.zeros(2, 3, 8, 8, dtype=dtype)
    expected = [sequential_draws(seed, (3, 8, 8), 7) for seed in (5, 3)]
    for draw in range(7):
        noise = source.randn_like(like)
        assert noise.dtype == dtype
        for image in range(2):
            assert torch.equal(noise[image].float(), expected[image][draw])


def test_single_draws_of_any_shape_on_the_cpu():
    """Joined draws of such a shape would change the CPU noise of published images."""
    source, like = PerImageGenerator([5]), torch.zeros(1, 1, 3, 5)
    for expected in sequential_draws(5, (1, 3, 5), 3):
        assert torch.equal(source.randn_like(like)[0], expected)


def test_draws_in_advance_are_used_once_and_for_their_shape_only(monkeypatch):
    monkeypatch.setitem(AHEAD, "cpu", 4)
    source = PerImageGenerator([5, 3])
    shapes = [(2, 3, 8, 8)] * 3 + [(2, 1, 16, 16)] * 5 + [(2, 3, 8, 8)] * 2
    draws = [source.randn_like(torch.zeros(shape)) for shape in shapes]
    assert [draw.shape for draw in draws] == shapes
    assert len({round(draw[0, 0, 0, 0].item(), 7) for draw in draws}) == len(draws)


def test_noise_follows_the_seed_and_not_the_place():
    like = torch.zeros(3, 1, 4, 4)
    forward, backward = PerImageGenerator([1, 2, 3]).randn_like(like), PerImageGenerator([3, 2, 1]).randn_like(like)
    assert torch.equal(forward, backward.flip(0))


def correlation(a, b):
    return (a * b).mean().item()


@pytest.mark.parametrize(("seed", "stream"), [(1, 0), (0, 1), (1, 1), (2**40, 0), (0, 7)])
def test_other_seeds_and_streams_are_independent(seed, stream):
    like = torch.zeros(1, 1, 100, 100)
    a, b = PerImageGenerator([0]).randn_like(like), PerImageGenerator([seed], stream=stream).randn_like(like)
    assert abs(correlation(a, b)) < 0.05  # five standard errors of 10 000 pixels


def test_successive_draws_are_independent():
    source, like = PerImageGenerator([0]), torch.zeros(1, 1, 100, 100)
    assert abs(correlation(source.randn_like(like), source.randn_like(like))) < 0.05


def test_noise_is_standard_normal():
    noise = PerImageGenerator([0]).randn_like(torch.zeros(1, 1, 200, 200, dtype=torch.float64))
    assert noise.mean().item() == pytest.approx(0, abs=0.025)  # five standard errors each
    assert (noise**2).mean().item() == pytest.approx(1, abs=0.036)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.25)


def test_pairs_of_seed_and_stream_give_distinct_generators():
    pairs = [(seed, stream) for seed in range(500) for stream in range(8)]
    mixed = {mix_seeds(seed, stream) for seed, stream in pairs}
    assert len(mixed) == len(pairs)


def test_mixed_seeds_fit_a_generator_for_any_integer():
    for seed in [-1, 0, 2**31, 2**63, 2**64 - 1]:
        assert 0 <= mix_seeds(seed, 0) < 2**63


def test_neighboring_seeds_differ_in_about_half_of_the_bits():
    differing = [(mix_seeds(seed, 0) ^ mix_seeds(seed + 1, 0)).bit_count() for seed in range(1000)]
    assert sum(differing) / 1000 == pytest.approx(63 / 2, abs=1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_another_size_is_refused(batch):
    with pytest.raises(ValueError, match=f"2 seeds for a batch of {batch} images"):
        PerImageGenerator([1, 2]).randn_like(torch.zeros(batch, 1, 4, 4))


def test_length_is_the_number_of_seeds():
    assert len(PerImageGenerator([4, 4, 2])) == 3


def test_precision_does_not_change_the_noise():
    like = torch.zeros(2, 3, 8, 8)
    single, double = PerImageGenerator([1, 2]).randn_like(like), PerImageGenerator([1, 2]).randn_like(like.double())
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "dtype"),
    [(2, torch.float32), (3, torch.float32), (3, torch.float64), (4, torch.float64), (8, torch.float32)],
)
def test_the_noise_kernel_equals_plain_torch(block, dtype):
    """Without a GPU in Triton's interpreter; images larger than a tile, and of odd sizes."""
    pytest.importorskip("triton", TRITON)
    from relay_diffusion.kernels.block_noise import add_block_noise

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for height, width in ((24, 48), (9, 8), (40, 33)):
        white, other = (torch.randn(2, 2, height, width, device=device, dtype=dtype) for _ in range(2))
        shifted = [other.double().roll((i, j), (-2, -1)) for i in range(block) for j in range(block)]
        expected = white.double() + 0.15 / block * sum(shifted)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            add_block_noise(white, other, block, 0.15 / block).double(), expected, rtol=0, atol=tolerance
        )


def test_noise_of_a_seed_equals_recorded_values():
    """Images published with their seeds must stay reproducible."""
    pairs = {(0, 0): 4685109482889842056, (1, 0): 1623429347705865049, (0, 1): 3896129788067985924}
    assert {pair: mix_seeds(*pair) for pair in pairs} == pairs
    drawn = PerImageGenerator([0, 7], stream=1).randn_like(torch.zeros(2, 1, 1, 2)).flatten()
    torch.testing.assert_close(drawn, torch.tensor([-0.2474, -0.5602, -0.5601, -0.2513]), atol=1e-4, rtol=0)


def test_manual_seed_equals_that_of_torch_and_queues_nothing_for_other_devices(monkeypatch):
    def refuse(*_):
        raise AssertionError("seeded a device that is not in use")

    torch.manual_seed(2**40 + 5)
    expected = torch.randn(4)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "_lazy_call", refuse)
        monkeypatch.setattr(module.random, "_lazy_call", refuse)
    manual_seed(2**40 + 5, torch.device("cpu"))
    assert torch.equal(torch.randn(4), expected)
