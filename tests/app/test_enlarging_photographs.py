"""Enlarge images of any size, within limits."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.app.enlarging import enlarge, enlarging_part, read_image
from relay_diffusion.app.jobs import Job
from relay_diffusion.app.stage_settings import StageSettings
from relay_diffusion.app.studio import Limits, build_studio
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from support import tiny_stage


def png(width, height, mode="RGB", **options):
    file = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), np.uint8)
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture
def enlarger(relay):
    return enlarging_part(relay)


def test_the_last_stage_enlarges(enlarger):
    assert list(enlarger.chain()) == ["relay"]
    assert enlarging_part(enlarger) is enlarger
    assert enlarging_part(Relay({"base": tiny_stage(8)})) is None


def test_the_enlarging_part_keeps_the_tiles():
    relay = Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2), "c": tiny_stage(24, 3)}, tile=24, overlap=12)
    part = enlarging_part(relay)
    assert list(part.chain()) == ["c"]
    assert part.describe_tiles()["c"] == relay.describe_tiles()["c"]


@pytest.mark.parametrize(("width", "height"), [(8, 8), (19, 11)])
def test_the_result_is_that_of_the_relay(enlarger, width, height):
    image, job = read_image(png(width, height), enlarger, 1), Job()
    result = enlarge(enlarger, image, seed=5, chosen_class="class 1", job=job)
    (expected,) = enlarger.to_pil(enlarger.sample([5], [1], start=image))
    assert result.after.tobytes() == expected.tobytes()
    assert result.before.size == result.after.size == (2 * width, 2 * height)
    assert job.done == job.total == result.evaluations == enlarger.evaluations((height, width))


def test_without_a_class_the_label_is_none(enlarger):
    image = read_image(png(8, 8), enlarger, 1)
    (expected,) = enlarger.to_pil(enlarger.sample([0], [-1], start=image))
    assert enlarge(enlarger, image).after.tobytes() == expected.tobytes()
    changed = enlarge(enlarger, image, settings={"relay": StageSettings(guidance_scale=3.0)}, chosen_class="0")
    assert changed.after.tobytes() != expected.tobytes()


def test_images_are_upright_and_opaque(enlarger):
    turned = Image.Exif()
    turned[0x0112] = 6
    assert read_image(png(12, 8, exif=turned), enlarger, 1).shape == (1, 3, 12, 8)
    assert read_image(png(12, 8, mode="RGBA"), enlarger, 1).shape == (1, 3, 8, 12)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(7, 20), "image is 7x20 .*: must be at least 8x8"),
        (png(600, 500), "image is 600x500: would become 1200x1000, 1.2 megapixels, .* at most 1; .*max_megapixels=2"),
        (b"\x89PNG\r\n\x1a\nrubbish", "image is not a PNG, WebP or JPEG image"),
        (b"", "image is not a PNG, WebP or JPEG image"),
        (png(8, 8)[:-20], "image cannot be decoded"),
    ],
)
def test_unusable_images_are_refused(enlarger, data, message):
    with pytest.raises(UserError, match=message) as error:
        read_image(data, enlarger, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, None])
def test_other_seeds_are_refused(enlarger, seed):
    with pytest.raises(UserError, match="seed: must be a whole number"):
        enlarge(enlarger, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), seed=seed)


def test_a_studio_has_the_parts_that_enlarge(relay, enlarger):
    studio = build_studio("tiny", relay, {"photos": enlarger})
    assert list(studio.enlargers) == ["photos", "tiny"]
    assert studio.draws
    assert studio.summary == "8x8 → 16x16 · 2 classes · cpu"
    only = build_studio("photos", enlarger, {})
    assert not only.draws
    assert only.summary == "enlarges 2 times · 2 classes · cpu"
    first = Relay({"base": tiny_stage(8)})
    assert build_studio("first", first, {}).enlargers == {}
    with pytest.raises(UserError, match="enlarge=first: no stage of this relay enlarges"):
        build_studio("tiny", relay, {"first": first})


@pytest.mark.parametrize("name", ["max_images", "batch_size", "max_megapixels"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        Limits(**{name: 0})
