"""Seeds, classes and plans of runs."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.data.class_choice import class_indices, labels_like_reference
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.batches import PlanDataModule
from relay_diffusion.sampling.plan import Plan, plan_from_images, plan_from_noise
from relay_diffusion.sampling.seeds import parse_seeds


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("5", [5]), (7, [7]), ("0-1,9", [0, 1, 9]), ([1, 2], [1, 2])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "0-2,1", "1.5", 1.5, None, [], "²", str(2**63)])
def test_invalid_seeds(text):
    with pytest.raises(UserError, match="seed"):
        parse_seeds(text)


@pytest.mark.parametrize("text", ["0-999999999999", "0-9999999,10000001", "1" * 5000, "0-" + "9" * 30])
def test_seeds_without_end_are_refused_at_once(text):
    tracemalloc.start()
    with pytest.raises(UserError, match="seed") as caught:
        parse_seeds(text, "relay.seeds")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("chosen", "classes", "names", "indices"),
    [
        (None, 3, [], [0, 1, 2]),
        (None, 0, [], [-1]),
        ("cat", 2, ["dog", "cat"], [1]),
        (1, 2, ["dog", "cat"], [1]),
        (["cat", 0, "cat"], 2, ["dog", "cat"], [1, 0, 1]),
        (-1, 2, [], [-1]),
    ],
)
def test_classes_by_name_or_number(chosen, classes, names, indices):
    assert class_indices(chosen, classes, names) == indices


@pytest.mark.parametrize(
    ("chosen", "classes", "names", "message"),
    [
        ("cat", 0, [], "the model has no classes"),
        ("bird", 2, ["dog", "cat"], r"dog, cat \(or as numbers 0 to 1\)"),
        (2, 2, ["dog", "cat"], r"dog, cat \(or as numbers 0 to 1\)"),
        (["dog", "bird"], 2, ["dog", "cat"], "class=bird"),
        ("Animals-Nature", 2, ["flags", "animals-nature"], r"did you mean animals-nature\?$"),
        ("flag", 2, ["Flags", "animals-nature"], r"did you mean Flags\?$"),
        (2, 2, [], "0 to 1"),
        ([], 2, [], "is empty"),
    ],
)
def test_unknown_classes(chosen, classes, names, message):
    with pytest.raises(UserError, match=message):
        class_indices(chosen, classes, names)


def test_classes_alternate_by_seed():
    plan = plan_from_noise("0-2,1005", [4, 2, 7])
    assert plan.labels == [4, 2, 7, 4]
    assert plan.names == [*(f"00000000/seed0000000{i}" for i in range(3)), "00001000/seed00001005"]


@pytest.fixture
def small_images(tmp_path):
    for i, name in enumerate(["b.png", "a/x.jpg", "a/y.webp"]):
        path = tmp_path / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(path)
    return ImageDataset(tmp_path / "small", 8)


def test_given_images_keep_their_names(small_images):
    plan = plan_from_images(small_images, None, None)
    assert plan.names == ["a/x", "a/y", "b"]
    assert (plan.seeds, plan.labels) == ([0, 1, 2], [-1, -1, -1])
    some = plan_from_images(small_images, "1-2", [5, 6])
    assert (some.names, some.seeds, some.labels) == (["a/y", "b"], [1, 2], [6, 5])
    with pytest.raises(UserError, match="holds 3 images, numbers 0 to 2"):
        plan_from_images(small_images, "1-3", None)


def test_given_images_that_would_share_a_file_are_refused(tmp_path):
    for name in ("x.png", "x.jpg", "x.png.webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"two of its images would be written as x\.png\.png"):
        plan_from_images(ImageDataset(tmp_path, 8), None, None)


def test_starting_images_have_the_classes_of_their_dataset(small_zip):
    dataset = ImageDataset(small_zip, 16)
    assert plan_from_images(dataset, "0-3", None).labels == dataset.labels[:4] == [0, 1, 0, 1]


class Device:
    global_rank, world_size = 1, 2


def test_every_device_gets_its_share_with_the_images_to_start_from(small_images):
    data = PlanDataModule(plan_from_images(small_images, None, None), [0, 1, 2], batch_size=2)
    data.trainer = Device()
    (batch,) = data.predict_dataloader()
    # one image is wanted; the batch has the size of all others
    assert (batch.positions.tolist(), batch.seeds.tolist(), batch.labels.tolist()) == ([1], [1, 1], [-1, -1])
    assert torch.equal(batch.start, torch.stack([small_images[1][0]] * 2))
    noise = PlanDataModule(Plan(["p", "q", "r", "s"], [3, 4, 9, 7], [0, 1, 0, 1]), [0, 1, 3], batch_size=2)
    noise.trainer = Device()
    (batch,) = noise.predict_dataloader()
    assert (batch.positions.tolist(), batch.seeds.tolist(), batch.start) == ([1], [4, 4], None)


def test_classes_like_a_reference_are_known_to_the_model(small_zip):
    """Published checkpoints have no class names: then the number of classes decides."""
    assert sorted(labels_like_reference(small_zip, "", 2, [], "reference")) == [0] * 12 + [1] * 12
    for num_classes, names in ((1, []), (2, ["a", "b"])):
        with pytest.raises(UserError, match=r"^class=reference: reference=.* has other classes than the model"):
            labels_like_reference(small_zip, "", num_classes, names, "reference")


def test_any_stretch_has_the_classes_about_as_often_as_the_whole(tmp_path):
    with image_zip(tmp_path / "set.zip", ["a", "b"]) as archive:
        for i in range(400):
            archive.add(f"{i:03d}.png", Image.new("RGB", (1, 1)), int(i >= 300))
    labels = labels_like_reference(tmp_path / "set.zip", "", 2, ["a", "b"], "reference")
    assert labels == labels_like_reference(tmp_path / "set.zip", "", 2, ["a", "b"], "reference")
    assert sum(labels) == 100
    for first in range(0, 400, 100):
        assert 10 < sum(labels[first : first + 100]) < 40  # 25 expected, 4.3 the standard deviation
