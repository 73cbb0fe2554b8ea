"""Relays that enlarge images of any size."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.tiling import TiledDenoiser
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay, SampleBatch
from support import tiny_stage


@pytest.fixture
def inputs(monkeypatch):
    """The shapes of all batches that networks see."""
    shapes = []
    denoiser = type(tiny_stage(4).denoiser)
    forward = denoiser.forward
    monkeypatch.setattr(
        denoiser, "forward", lambda self, x, *given: shapes.append(tuple(x.shape)) or forward(self, x, *given)
    )
    return shapes


def test_images_of_odd_size_are_enlarged_in_tiles(inputs):
    relay = Relay({"b": tiny_stage(32, 4)}, tile_batch=5)
    start = torch.rand(2, 3, 21, 33) * 2 - 1
    images = relay.sample([1, 2], start=start)
    assert tuple(images.shape) == (2, 3, 84, 132)
    assert {shape[1:] for shape in inputs} == {(3, 32, 32)}
    assert max(shape[0] for shape in inputs) == 4  # two tiles of two images
    assert sum(shape[0] for shape in inputs) == 2 * relay.evaluations((21, 33))
    assert torch.equal(images, relay.sample([1, 2], start=start))
    alone = relay.sample([2], start=start[1:])
    torch.testing.assert_close(alone, images[1:], rtol=0, atol=1e-4)


class Allocated(TorchDispatchMode):
    """Bytes of the results of all operations."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def test_the_memory_of_the_network_depends_on_the_tile_alone(monkeypatch):
    stage, peaks = tiny_stage(32, 4), []
    forward = type(stage.denoiser).forward

    def measured(self, *given):
        with Allocated() as allocated:
            estimate = forward(self, *given)
        peaks[-1] = max(peaks[-1], allocated.bytes)
        return estimate

    monkeypatch.setattr(type(stage.denoiser), "forward", measured)
    for tile, side in ((32, 12), (32, 24), (96, 24)):
        peaks.append(0)
        Relay({"b": stage}, tile=tile, tile_batch=4).sample([1], start=torch.zeros(1, 3, side, side))
    small, large, whole = peaks
    assert small == large
    assert whole > 2 * large  # 96 x 96 pixels at once instead of four tiles of 32 x 32


def test_the_sampler_and_its_noise_see_the_whole_image(monkeypatch):
    """Tiles of an identity denoiser give exactly the samples of the whole image."""
    stage = tiny_stage(32, 4)
    monkeypatch.setattr(stage, "guided_denoiser", lambda *_: lambda x, sigma, labels: 0.9 * x.float())  # noqa: ARG005
    start = torch.rand(1, 3, 40, 25) * 2 - 1
    tiled = Relay({"b": stage}, tile=32, overlap=8).sample([3], start=start)
    whole = Relay({"b": stage}, tile=256).sample([3], start=start)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_small_images_are_padded_to_the_size_of_training(inputs):
    relay = Relay({"b": tiny_stage(64, 4)})
    assert relay.sampled_sizes((9, 20)) == {"b": (64, 80)}
    assert tuple(relay.sample([0], start=torch.zeros(1, 3, 9, 20)).shape) == (1, 3, 36, 80)
    assert set(inputs) == {(2, 3, 64, 64)}
    assert Relay({"b": tiny_stage(64, 4)}, tile=16).sampled_sizes((9, 20)) == {"b": (36, 80)}


def test_images_of_the_size_of_training_are_enlarged_as_in_one_piece():
    stage, start = tiny_stage(32, 4), torch.rand(2, 3, 8, 8) * 2 - 1
    expected = stage.sample((2, 3, 32, 32), [1, 2], previous=start)
    assert torch.equal(Relay({"b": stage}).sample([1, 2], start=start), expected)


def test_sizes_that_levels_do_not_divide_are_padded():
    relay = Relay({"b": tiny_stage(12, 3)})  # two levels and blocks of 3: divisible by 6
    assert relay.sampled_sizes((11, 8)) == {"b": (36, 24)}
    assert tuple(relay.sample([0], start=torch.zeros(1, 3, 11, 8)).shape) == (1, 3, 33, 24)


def test_small_images_are_padded_once():
    """The second stage pads its own input, not the padding of the first."""
    stage = tiny_stage(64, 4)
    relay = Relay({"b": stage, "b_2": stage}, resolution=256)
    assert relay.sampled_sizes((9, 10)) == {"b": (64, 64), "b_2": (144, 160)}
    assert tuple(relay.sample([0], start=torch.zeros(1, 3, 9, 10)).shape) == (1, 3, 144, 160)


def test_a_stage_is_applied_twice():
    stage, start = tiny_stage(16, 2), torch.rand(1, 3, 9, 13) * 2 - 1
    twice = Relay({"b": stage, "b_2": stage}, resolution=32)
    images = twice.sample_stages([4], start=start)
    assert [tuple(x.shape) for x in images.values()] == [(1, 3, 18, 26), (1, 3, 36, 52)]
    once = Relay({"b": stage}).sample([4], start=start)
    torch.testing.assert_close(images["b"], once, rtol=0, atol=0)
    again = Relay({"b": stage}).sample([4], start=once.clamp(-1, 1))
    torch.testing.assert_close(images["b_2"], again, rtol=0, atol=0)


def test_tiles_keep_the_block_means_with_consistency():
    start = torch.rand(1, 3, 21, 33) * 2 - 1
    images = Relay({"b": tiny_stage(32, 4)}, consistency=True).sample([1], start=start)
    torch.testing.assert_close(block_mean(images, 4), start, rtol=0, atol=1e-5)


def test_evaluations_of_tiles_are_observed_and_counted():
    relay, seen, whole = Relay({"b": tiny_stage(32, 4)}), [], []
    relay.tile_observers.append(lambda stage, x, *_: seen.append((stage, len(x), tuple(x.shape[2:]))))
    relay.observers.append(lambda stage, x, *_: whole.append((stage, tuple(x.shape[2:]))))
    start = torch.zeros(1, 3, 20, 30, dtype=torch.uint8)
    relay.predict_step(SampleBatch(torch.tensor([0]), torch.tensor([1]), torch.tensor([-1]), start), 0)
    evaluations = relay.samplers["b"].evaluations
    assert whole == [("b", (80, 120))] * evaluations
    assert {size for _, _, size in seen} == {(32, 32)}
    assert sum(count for _, count, _ in seen) == relay.evaluations((20, 30)) == evaluations * 3 * 5


def test_tiles_are_those_of_training_by_default():
    assert Relay({"b": tiny_stage([32, 64], 4)}).describe_tiles() == {"b": {"tile": [32, 64], "overlap": 8}}
    relay = Relay({"b": tiny_stage([32, 64], 4)}, tile=[48, 48], overlap=16)
    assert relay.describe_tiles() == {"b": {"tile": 48, "overlap": 16}}


def test_images_from_noise_are_never_tiled(monkeypatch):
    monkeypatch.setattr(TiledDenoiser, "__call__", None)
    Relay({"a": tiny_stage(8), "b": tiny_stage(16, 2)}, resolution=64, tile=16, overlap=4).sample([0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 8}, r"^relay\.tile=8: is smaller than the network needs; use at least 16"),
        ({"tile": [32, 34]}, r"^relay\.tile=\[32, 34\]: must be divisible by 4; use 32"),
        ({"overlap": 6}, r"^relay\.overlap=6: must be divisible by 4"),
        ({"overlap": 32}, r"^relay\.overlap=32: must be above 0 and below the tile, 32; use 8"),
        ({"tile_batch": 0}, r"^relay\.tile_batch=0: must be at least 1"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Relay({"b": tiny_stage(32, 4)}, **options)


def test_images_below_8_pixels_are_refused():
    with pytest.raises(ValueError, match=r"^start has images of 9x7 \(width x height\): must be at least 8x8; pad"):
        Relay({"b": tiny_stage(32, 4)}).sample([0], start=torch.zeros(1, 3, 7, 9))
