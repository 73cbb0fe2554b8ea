"""Draw images with steps and guidance of one's choice."""

import numpy as np
import pytest

from relay_diffusion.app.drawing import DrawOptions, draw
from relay_diffusion.app.jobs import Job
from relay_diffusion.app.stage_settings import StageSettings, adjusted, can_guide, max_steps, stored_steps
from relay_diffusion.errors import UserError
from support import tiny_stage


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def test_images_are_those_of_the_relay_with_classes_in_turn(relay):
    job = Job()
    drawing = draw(relay, DrawOptions(seeds="1-3"), job)
    expected = relay.to_pil(relay.sample([1, 2, 3], [1, 0, 1]))
    np.testing.assert_array_equal(pixels(drawing.images), pixels(expected))
    assert drawing.captions == ["seed 1 · class 1", "seed 2 · class 0", "seed 3 · class 1"]
    assert job.done == job.total == 3 * sum(drawing.evaluations.values())


@pytest.mark.parametrize(("chosen", "label"), [("class 1", 1), ("1", 1), ("-1", -1)])
def test_one_class_or_none(relay, chosen, label):
    drawing = draw(relay, DrawOptions(seeds="4", chosen_class=chosen))
    np.testing.assert_array_equal(pixels(drawing.images), pixels(relay.to_pil(relay.sample([4], [label]))))


def test_frames_lead_through_both_stages(relay):
    drawing = draw(relay, DrawOptions(seeds="0-2", batch_size=2))
    assert len(drawing.images) == 3
    for name in ("base", "relay"):
        frames = [frame for frame in drawing.frames if frame.stage == name]
        sigmas = [frame.sigma for frame in frames]
        assert sigmas == sorted(sigmas, reverse=True)
        assert sigmas[-1] == 0
        assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
        assert {frame.evaluations for frame in frames} == {len(frames) - 1}
    assert [frame.stage for frame in drawing.frames] == sorted(frame.stage for frame in drawing.frames)
    assert {frame.picture.size for frame in drawing.frames} == {(3 * 128 + 4, 2 * 128 + 2)}
    assert len({frame.picture.tobytes() for frame in drawing.frames}) == len(drawing.frames)


def test_only_the_first_images_have_a_trajectory(relay):
    drawing = draw(relay, DrawOptions(seeds="0-9", batch_size=4))
    assert len(drawing.images) == 10
    assert drawing.frames[0].picture.width == 8 * 128 + 7 * 2
    assert relay.observers == []


def test_steps_and_guidance_apply_to_one_drawing(relay):
    before = draw(relay, DrawOptions(seeds="0"))
    stages = {"base": StageSettings(steps=2, guidance_scale=3.0), "relay": StageSettings(guidance_scale=1.0)}
    changed = draw(relay, DrawOptions(seeds="0", stages=stages))
    base = relay.chain()["base"]
    assert changed.evaluations == before.evaluations | {"base": 3}
    assert changed.images[0].tobytes() != before.images[0].tobytes()
    assert (base.sampler.evaluations, base.guidance_scale) == (before.evaluations["base"], 1)
    assert draw(relay, DrawOptions(seeds="0")).images[0].tobytes() == before.images[0].tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": "three"}, "seeds=three: use numbers and ranges"),
        ({"seeds": "0-99"}, "seeds=0-99: 100 images; at most 16 at once"),
        ({"seeds": ""}, "seeds="),
        ({"chosen_class": "zebra"}, "class=zebra is not known"),
        ({"prompt": "red fox"}, "prompt was given, but the model was trained without text"),
        ({"negative_prompt": "red fox"}, "negative_prompt was given, but the model was trained without text"),
        ({"stages": {"base": StageSettings(steps=0)}}, "steps of base is 0: must be a whole number from 1 to 40"),
        ({"stages": {"base": StageSettings(steps=10**9)}}, "steps of base is 1000000000"),
        ({"stages": {"relay": StageSettings(guidance_scale=99)}}, "guidance of relay is 99: must lie between 0 and 8"),
    ],
)
def test_errors_name_the_field(relay, options, message):
    job = Job()
    with pytest.raises(UserError, match=message) as error:
        draw(relay, DrawOptions(**{"seeds": "0", **options}), job)
    assert "\n" not in str(error.value)
    assert job.done == 0


def test_sliders_follow_the_stages(relay):
    stage = relay.chain()["base"]
    assert (stored_steps(stage), max_steps(stage), can_guide(stage)) == (4, 40, True)
    plain = tiny_stage(8, num_classes=0)  # built, not loaded: no config
    assert (stored_steps(plain), can_guide(plain)) == (None, False)


def test_prompts_of_a_relay_with_text(text_relay):
    stages = {"base": StageSettings(guidance_scale=3.0)}
    options = [
        DrawOptions(seeds="0", prompt=prompt, negative_prompt=negative, stages=stages)
        for prompt, negative in (("red fox", ""), ("", ""), ("red fox", "blue"))
    ]
    assert len({draw(text_relay, option).images[0].tobytes() for option in options}) == 3
    several = draw(text_relay, DrawOptions(seeds="0,1,2", prompt="red fox\n\n light \n", stages=stages))
    assert several.captions == ["seed 0 · red fox", "seed 1 · light", "seed 2 · red fox"]
    with adjusted(text_relay, stages):
        expected = text_relay.sample([0, 1, 2], prompt=["red fox", "light", "red fox"])
    assert [image.tobytes() for image in several.images] == [image.tobytes() for image in text_relay.to_pil(expected)]
    with pytest.raises(UserError, match="negative_prompt: needs classifier-free guidance"):
        draw(text_relay, DrawOptions(seeds="0", negative_prompt="blue"))
