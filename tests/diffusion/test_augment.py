"""Augmentation: labels, positions of pixels, and unchanged images."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.diffusion.augment import CENTER, LABEL_NAMES, LABELS, SYM6, Augmentation, Parameters, warp
from relay_diffusion.diffusion.pixels import to_float
from support import PROJECT

BASE = 2**0.2
RANDOM = np.random.default_rng(1)
BLOBS = [(*RANDOM.uniform(-9, 9, 2), RANDOM.uniform(2.5, 4), RANDOM.uniform(-0.6, 0.6)) for _ in range(12)]
COUNT = 40_000  # draws of a tested distribution


def smooth(x, y):
    """A band-limited image in [-1, 1] as a formula: x right, y down, from the center."""
    return sum(height * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * width**2)) for a, b, width, height in BLOBS)


def grid(height, width):
    y, x = np.mgrid[:height, :width].astype(np.float64)
    return x - (width - 1) / 2, y - (height - 1) / 2


def tensor(array):
    return torch.tensor(array, dtype=torch.float32)[None, None]


def parameters(count=1, **given):
    """Parameters with the given values for each image; all others are 0."""
    assert set(given) <= set(Parameters._fields)
    values = {name: torch.full((count,), float(given.get(name, 0))) for name in Parameters._fields}
    return Parameters(**values | {name: values[name].bool() for name in ("x_flip", "y_flip")})


def transformed(image, **given):
    return Augmentation().apply(image, parameters(len(image), **given))


def assert_is_smooth_at(result, x, y):
    """Check that pixels equal `smooth` at the points x, y that are well inside the image."""
    height, width = x.shape
    inside = (abs(x) < width / 2 - 3) & (abs(y) < height / 2 - 3)
    assert inside.sum() > 300
    assert abs(result[0, 0].double().numpy() - smooth(x, y))[inside].max() < 0.006  # bilinear: f'' / 32 for each axis


def test_label_columns_have_the_listed_names():
    assert LABELS == len(LABEL_NAMES) == Augmentation().labels == 9
    p = Parameters(*torch.tensor([[1.0], [2], [3], [0.3], [0.4], [5], [6], [7]]))
    expected = [1, 2, 3, math.cos(0.3) - 1, math.sin(0.3), 5 * math.cos(0.4), 5 * math.sin(0.4), 6, 7]
    assert p.labels()[0].tolist() == pytest.approx(expected, abs=1e-6)
    of = dict(zip(LABEL_NAMES, p.labels()[0].tolist(), strict=True))
    assert (of["scale"], of["translation_x"], of["translation_y"]) == (3, 6, 7)


def test_probability_0_changes_nothing_and_above_0_half_are_mirrored():
    images = torch.randn(4000, 1, 2, 3)
    result, labels = Augmentation(probability=0)(images)
    assert torch.equal(result, images)
    assert not labels.any()
    result, labels = Augmentation(probability=1e-9)(images)
    flipped = labels[:, 0] == 1
    assert torch.equal(result, torch.where(flipped[:, None, None, None], images.flip(3), images))
    assert abs(flipped.float().mean().item() - 0.5) < 5 * math.sqrt(0.25 / 4000)
    assert not labels[:, 1:].any() and not Augmentation(1e-9, x_flip=False)(images)[1].any()  # noqa: PT018


def test_labels_describe_the_transformation_of_each_image():
    images = torch.randn(400, 1, 6, 6)
    result, labels = Augmentation(probability=0.1)(images)
    untouched = ~labels.any(dim=1)
    assert 60 < untouched.sum() < 200
    assert torch.equal(result[untouched], images[untouched])
    assert (result[~untouched] != images[~untouched]).flatten(1).any(dim=1).all()
    mirrored = ~labels[:, 1:].any(dim=1) & ~untouched
    assert torch.equal(result[mirrored], images[mirrored].flip(3))
    upside_down = (labels[:, 1] == 1) & (labels != 0).sum(dim=1).eq(1)
    assert torch.equal(result[upside_down], images[upside_down].flip(2))


@pytest.mark.parametrize("p", [0.12, 0.6])
def test_share_of_images_a_transformation_is_applied_to(p):
    labels = Augmentation(p).draw(COUNT).labels()
    expected = torch.tensor([0.5, p / 2, p, p, p, p, p, p, p], dtype=torch.float64)
    expected[LABEL_NAMES.index("anisotropy_y")] = p / 2  # half of them act along x
    error = (labels != 0).double().mean(dim=0) - expected
    assert (error.abs() < 5 * (expected * (1 - expected) / COUNT).sqrt()).all()


def test_transformations_are_applied_independently():
    labels = Augmentation(0.5).draw(COUNT).labels()
    applied = (labels[:, [0, 1, 2, 4, 5, 7]] != 0).double()
    assert (torch.corrcoef(applied.T) - torch.eye(6)).abs().max() < 5 / math.sqrt(COUNT)
    assert torch.equal(labels[:, 7] != 0, labels[:, 8] != 0)  # one translation, in both directions
    assert torch.corrcoef(labels.T.double())[7, 8].abs() < 5 / math.sqrt(COUNT)


def moments(values, mean, mean_square):
    """Check the first and second moments to 5 standard errors."""
    for sample, expected in ((values, mean), (values**2, mean_square)):
        assert abs(sample.mean().item() - expected) < 5 * sample.std().item() / math.sqrt(len(sample))


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_distributions_of_the_labels(p):
    labels = Augmentation(p).draw(COUNT).labels().double()
    of = dict(zip(LABEL_NAMES, labels.T, strict=True))
    moments(of["x_flip"], 1 / 2, 1 / 2)
    moments(of["y_flip"], p / 2, p / 2)
    for name in ("scale", "translation_x", "translation_y"):
        moments(of[name], 0, p)
        moments(of[name] ** 2, p, 3 * p)  # E a^4 = 3 for a Gaussian
    moments(of["rotation_sin"], 0, p / 2)
    moments(of["rotation_cos"], -p, 1.5 * p)  # E (cos - 1)^2 = 1/2 + 1
    moments(of["rotation_sin"] * of["rotation_cos"], 0, p * (1 / 8 + 1 / 2))  # E sin^2 (cos - 1)^2
    x, y = of["anisotropy_x"], of["anisotropy_y"]  # half of them have y = 0
    moments(x, 0, p * 3 / 4)
    moments(y, 0, p / 4)
    moments(x**2 + y**2, p, 3 * p)
    moments(x * y, 0, p / 2 * 3 / 8)  # E a5^4 cos^2 sin^2


def test_direction_of_anisotropy_is_uniform_or_along_x():
    slanted = Augmentation(1.0, anisotropy_axis_aligned=0.0).draw(COUNT)
    assert 3.13 < slanted.direction.abs().max() < 3.142
    moments(slanted.direction.double(), 0, math.pi**2 / 3)
    assert not Augmentation(1.0, anisotropy_axis_aligned=1.0).draw(COUNT).direction.any()
    moments((Augmentation(1.0, anisotropy_axis_aligned=0.2).draw(COUNT).direction == 0).double(), 0.2, 0.2)


def test_the_seed_determines_the_augmentation():
    first, again, other = (torch.manual_seed(seed) and Augmentation(0.5).draw(4).labels() for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(again, other)


def test_filter_is_the_symlet_with_six_vanishing_moments():
    h = np.array(SYM6)
    tap = np.arange(12)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    for shift in range(6):
        assert (h[2 * shift :] * h[: 12 - 2 * shift]).sum() == pytest.approx(float(shift == 0), abs=1e-11)
        assert ((-1.0) ** tap * h * (tap - 5.5) ** shift).sum() == pytest.approx(0, abs=1e-6)  # a vanishing moment
    assert (h * (tap - CENTER) ** 2).sum() == pytest.approx(0, abs=1e-9)  # a pure shift up to degree 2
    # of the filters with these properties it is nearest to symmetry: its phase is nearly that of a shift
    frequency = np.linspace(0, math.pi / 2, 50)[:, None]
    phase = np.angle((h * np.exp(1j * frequency * (tap - CENTER))).sum(axis=1))
    assert abs(phase).max() < 0.5


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 14), (31, 17), (2, 3), (4, 2)])
def test_resampling_by_the_identity_is_exact_up_to_the_border(height, width):
    noise = torch.randn(2, 3, height, width)
    torch.testing.assert_close(warp(noise, torch.eye(2, 3).expand(2, 2, 3)), noise, atol=3e-5, rtol=0)


GRID = grid(38, 43)
TRANSFORMATIONS = {
    # name: (parameters, where the image is read for the pixel at x, y)
    "larger": ({"scale": 1.7}, lambda x, y: (x / BASE**1.7, y / BASE**1.7)),
    "smaller": ({"scale": -1.3}, lambda x, y: (x * BASE**1.3, y * BASE**1.3)),
    "counter-clockwise": ({"rotation": 0.4}, lambda x, y: turned(x, y, 0.4)),
    "clockwise": ({"rotation": -2.2}, lambda x, y: turned(x, y, -2.2)),
    "half a turn": ({"rotation": math.pi}, lambda x, y: (-x, -y)),
    "wide": ({"stretch": 1.5}, lambda x, y: (x / BASE**1.5, y * BASE**1.5)),
    "narrow": ({"stretch": -1.5, "direction": math.pi}, lambda x, y: (x * BASE**1.5, y / BASE**1.5)),
    "slanted": (
        {"stretch": 1.1, "direction": 0.5},
        lambda x, y: stretched(x, y, BASE**1.1, -0.5),
    ),  # counter-clockwise as seen
    "right": ({"right": 0.9}, lambda x, y: (x - 0.9 * 43 / 8, y)),
    "up": ({"down": -1.1}, lambda x, y: (x, y + 1.1 * 38 / 8)),
}


def turned(x, y, angle):
    """Return the point that a counter-clockwise rotation moves to x, y (y down)."""
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def stretched(x, y, factor, direction):
    """Return the point that stretching by `factor` along (cos, sin), and shrinking across, moves to x, y."""
    cos, sin = math.cos(direction), math.sin(direction)
    along, across = (x * cos + y * sin) / factor, (y * cos - x * sin) * factor
    return along * cos - across * sin, along * sin + across * cos


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformation_agrees_with_the_formula(name):
    given, source = TRANSFORMATIONS[name]
    assert_is_smooth_at(transformed(tensor(smooth(*GRID)), **given), *source(*GRID))


@pytest.mark.parametrize("flips", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_order_and_strength_of_the_transformations(flips):
    augmentation = Augmentation(scale_base=1.5, anisotropy_base=1.3, translation=0.05)
    given = {"scale": 0.8, "rotation": 0.7, "direction": -0.9, "stretch": 1.2, "right": -1.6, "down": 1.5}
    drawn = parameters(x_flip=flips[0], y_flip=flips[1], **given)
    x, y = GRID[0] + 1.6 * 0.05 * 43, GRID[1] - 1.5 * 0.05 * 38  # undone in reverse: the last is undone first
    x, y = turned(*stretched(x, y, 1.3**1.2, 0.9), 0.7)
    x, y = x / 1.5**0.8 * (1 - 2 * flips[0]), y / 1.5**0.8 * (1 - 2 * flips[1])
    assert_is_smooth_at(augmentation.apply(tensor(smooth(*GRID)), drawn), x, y)


DESTINATIONS = [  # of the point at 5, 2
    ({"right": 0.8}, (9, 2)),
    ({"down": 0.8}, (5, 6)),
    ({"rotation": math.pi / 2}, (2, -5)),  # what was at the right goes to the top
    ({"scale": 5 * math.log2(1.25)}, (6.25, 2.5)),
    ({"stretch": 5 * math.log2(1.25), "direction": math.pi / 2}, (4, 2.5)),
    ({"stretch": 5 * math.log2(1.2), "direction": math.atan2(-2, 5)}, (6, 2.4)),  # along its own direction, y down
    ({"x_flip": 1, "right": 0.8}, (-1, 2)),
    ({"y_flip": 1, "rotation": math.pi / 2}, (-2, -5)),
]


@pytest.mark.parametrize(("given", "expected"), DESTINATIONS)
def test_a_blob_moves_to_its_expected_position(given, expected):
    x, y = grid(40, 40)
    blob = transformed(tensor(np.exp(-((x - 5) ** 2 + (y - 2) ** 2) / (2 * 2.0**2))), **given)[0, 0].numpy()
    center_of_mass = (x * blob).sum() / blob.sum(), (y * blob).sum() / blob.sum()
    np.testing.assert_allclose(center_of_mass, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", [40, 41])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_rot90(size, quarters):
    image = tensor(smooth(*grid(size, size)))
    expected = torch.rot90(image, quarters, (2, 3))
    torch.testing.assert_close(transformed(image, rotation=quarters * math.pi / 2), expected, atol=0.005, rtol=0)


@pytest.mark.parametrize("degrees", [20, -75])
def test_rotation_of_a_picture_is_that_of_pillow(degrees):
    pixels = ImageDataset(PROJECT / "demo" / "emoji-64.zip", 64)[1500][0]
    pillow = Image.fromarray(pixels.permute(1, 2, 0).numpy()).rotate(degrees, Image.Resampling.BICUBIC)
    expected = to_float(torch.from_numpy(np.array(pillow)).permute(2, 0, 1))
    result = transformed(to_float(pixels)[None], rotation=math.radians(degrees))[0]
    disc = torch.from_numpy(np.hypot(*grid(64, 64)) < 30)
    assert (to_float(pixels) - expected)[:, disc].abs().mean() > 0.1
    assert (result - expected)[:, disc].abs().mean() < 0.02  # 1% of the range, most of it along sharp edges


@pytest.mark.parametrize("pixels", [6, -9, 25, 90])
def test_images_are_mirrored_at_the_border(pixels):
    x, _ = grid(12, 16)
    image = np.sin(x * 0.3)  # steep at the borders
    mirrored = np.pad(image, ((0, 0), (100, 100)), mode="reflect")[:, 100 - pixels : 116 - pixels]
    assert abs(transformed(tensor(image), right=pixels * 8 / 16) - tensor(mirrored)).max() < 0.03
    assert abs(transformed(tensor(image.T), down=pixels * 8 / 16) - tensor(mirrored.T)).max() < 0.03


def test_images_and_channels_are_independent():
    augmentation, images = Augmentation(0.6), torch.randn(8, 3, 12, 14)
    drawn = augmentation.draw(8)
    together = augmentation.apply(images, drawn)
    for i in range(8):
        for channel in range(3):
            alone = augmentation.apply(images[[i]][:, [channel]], Parameters(*(values[[i]] for values in drawn)))
            torch.testing.assert_close(alone[0, 0], together[i, channel], atol=1e-6, rtol=0)


EXTREME = [{"scale": 80.0}, {"scale": -80.0}, {"right": 1e7, "down": -1e7}, {"stretch": 60.0, "direction": 0.3}]


@pytest.mark.parametrize("given", [*EXTREME, {"rotation": 1.0, "right": 3.0}])
def test_no_parameter_gives_pixels_far_from_the_image(given):
    noise, constant = torch.rand(2, 3, 16, 20) * 2 - 1, torch.full((1, 1, 20, 13), 0.7)
    assert transformed(noise, **given).abs().max() < 2  # false for NaN
    torch.testing.assert_close(transformed(constant, **given), constant, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 3, 64, 48), (3, 1, 17, 33), (2, 4, 2, 2), (5, 3, 3, 20), (0, 3, 8, 8)])
def test_shape_and_dtype_are_kept(shape):
    images = torch.randn(shape)
    before = images.clone()
    result, labels = Augmentation(1.0)(images)
    assert (result.shape, labels.shape) == (shape, (shape[0], 9))
    assert (result.dtype, labels.dtype) == (torch.float32, torch.float32)
    assert result.isfinite().all()
    assert torch.equal(images, before)


def test_autocast_changes_nothing():
    augmentation, images = Augmentation(1.0), torch.randn(4, 3, 16, 16)
    drawn = augmentation.draw(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, labels = augmentation.apply(images, drawn), drawn.labels()
    torch.testing.assert_close((result, labels), (augmentation.apply(images, drawn), drawn.labels()), atol=0, rtol=0)


def test_augmentation_needs_no_synchronization():
    with FakeTensorMode():  # tensors without values raise where code reads one
        result, labels = Augmentation()(torch.zeros(2, 3, 16, 16))
    assert (result.shape, labels.shape) == ((2, 3, 16, 16), (2, 9))


IMPOSSIBLE = [("probability", -0.1), ("probability", 1.1), ("probability", math.nan), ("translation", 0.0)]
IMPOSSIBLE += [("translation", math.nan), ("scale_base", 1.0), ("scale_base", math.inf), ("anisotropy_base", 0.9)]
IMPOSSIBLE += [("anisotropy_axis_aligned", -0.1), ("anisotropy_axis_aligned", 1.1)]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}: "):
        Augmentation(**{name: value})


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3, 8, 8), torch.uint8), ((3, 8, 8), None), ((2, 3, 1, 8), None)])
def test_other_images_are_refused(shape, dtype):
    with pytest.raises(ValueError, match="need float32 images"):
        Augmentation()(torch.zeros(shape, dtype=dtype))
