"""Relays: compatible stages and their samples."""

import pytest
import torch

from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay, SampleBatch
from relay_diffusion.models.stage import StageInfo
from relay_diffusion.samplers import EDMSampler
from support import tiny_stage


def test_three_stages_of_different_factors():
    relay = Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2), "c": tiny_stage(24, 3, num_classes=0)})
    images = relay.sample_stages([0, 1], torch.tensor([0, 1]))
    assert [tuple(x.shape) for x in images.values()] == [(2, 3, 4, 4), (2, 3, 8, 8), (2, 3, 24, 24)]
    torch.testing.assert_close(relay.sample([0, 1], torch.tensor([0, 1])), images["c"], rtol=0, atol=0)
    assert relay.num_classes == 2
    assert relay.resolution == 24


def test_a_stage_starts_from_the_images_of_the_one_before():
    first, second = tiny_stage(4), tiny_stage(8, 2)
    images = Relay({"a": first, "b": second}).sample_stages([5])
    alone = second.sample((1, 3, 8, 8), [5], previous=images["a"].clamp(-1, 1))
    torch.testing.assert_close(images["b"], alone, rtol=0, atol=0)
    other = second.sample((1, 3, 8, 8), [5], previous=-images["a"].clamp(-1, 1))
    assert (block_mean(images["b"], 2) - block_mean(other, 2)).abs().max() > 0.1


def test_a_relay_samples_other_sizes_than_those_of_training():
    stages = {"a": tiny_stage(4), "b": tiny_stage([12, 8], 2), "c": tiny_stage(24, 3)}
    with pytest.raises(UserError, match=r"b enlarges 4x6 .* to 8x12 .*a makes 4x4; .*relay\.resolution=R or"):
        Relay(stages)
    relay = Relay(stages, resolution=[36, 24])
    assert (relay.size, relay.resolution, relay.start_size) == ((36, 24), [36, 24], None)
    images = relay.sample_stages([3, 5])
    assert [tuple(x.shape) for x in images.values()] == [(2, 3, 6, 4), (2, 3, 12, 8), (2, 3, 36, 24)]
    alone = stages["a"].sample((2, 3, 6, 4), [3, 5])
    assert torch.equal(images["a"], alone)
    previous = images["a"].clamp(-1, 1)
    assert torch.equal(images["b"], stages["b"].sample((2, 3, 12, 8), [3, 5], previous=previous))
    assert [stage["resolution"] for stage in relay.describe()["stages"].values()] == [[6, 4], [12, 8], [36, 24]]
    assert Relay({"b": stages["b"]}, resolution=20).start_size == (10, 10)


@pytest.mark.parametrize(("resolution", "remedy"), [([36, 20], [36, 24]), (30, 24), ([12, 1], 12)])
def test_a_size_that_levels_or_blocks_do_not_divide_is_refused(resolution, remedy):
    """The levels of the first stage need sides of 2, so those of the last one are multiples of 2 * 2 * 3."""
    stages = {"a": tiny_stage(4), "b": tiny_stage(8, 2), "c": tiny_stage(24, 3)}
    with pytest.raises(UserError) as caught:
        Relay(stages, resolution=resolution)
    assert str(caught.value).startswith(f"relay.resolution={resolution}: height and width must be divisible by 12, ")
    assert str(caught.value).endswith(f"; use {remedy}")
    Relay(stages, resolution=remedy)
    with pytest.raises(ValueError, match=r"^relay\.resolution=\[12\]: must be a whole number, or"):
        Relay(stages, resolution=[12])


def test_stages_of_one_seed_do_not_share_noise():
    seen = {}

    class Spy:
        evaluations = 1

        def __init__(self, name):
            self.name = name

        def __call__(self, denoise, start, randn_like, labels):  # noqa: ARG002
            seen[self.name] = randn_like(torch.empty(1, 3, 8, 8))
            return start

    first, second = tiny_stage(4), tiny_stage(8, 2)
    first.sampler, second.sampler = Spy("a"), Spy("b")
    Relay({"a": first, "b": second}).sample([0])
    assert abs(torch.corrcoef(torch.stack([seen["a"].flatten(), seen["b"].flatten()]))[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, "at least a first stage"),
        ({"a": (4, 1, 2), "b": (4, 1, 2)}, "b starts from noise"),
        ({"a": (4, 1, 2), "b": (16, 2, 2)}, "enlarges 8x8 to 16x16, but relay.stages.a makes 4x4; use a stage of 8x8"),
        ({"a": (4, 1, 2), "b": (8, 2, 3)}, "3 classes"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, message):
    built = {name: tiny_stage(*arguments) for name, arguments in stages.items()}
    with pytest.raises(UserError, match=message):
        Relay(built)


def test_stages_of_other_classes_are_refused():
    small = tiny_stage(4, info=StageInfo(class_names=["cat", "dog"]))
    large = tiny_stage(8, 2, info=StageInfo(class_names=["dog", "cat"]))
    with pytest.raises(UserError, match="other names or order"):
        Relay({"a": small, "b": large})


def test_stages_of_other_channels_are_refused():
    with pytest.raises(UserError, match=r"^relay\.stages\.b has 1 image channels, a has 3$"):
        Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2, image_channels=1)})


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_of_other_channels(channels, mode):
    stages = {"a": tiny_stage(4, image_channels=channels), "b": tiny_stage(8, 2, image_channels=channels)}
    relay = Relay(stages)
    images = relay.sample([0, 1])
    assert (relay.image_channels, images.shape) == (channels, (2, channels, 8, 8))
    assert [(image.mode, image.size) for image in relay.to_pil(images)] == [(mode, (8, 8))] * 2


def test_classes_are_refused_by_an_unconditional_relay():
    relay = Relay({"a": tiny_stage(4, num_classes=0)})
    with pytest.raises(UserError, match="the model has no classes"):
        relay.sample([0], torch.tensor([1]))
    assert relay.sample([0], torch.tensor([-1])).shape == (1, 3, 4, 4)


def test_predict_step_is_sampling():
    relay = Relay({"a": tiny_stage(4)})
    batch = SampleBatch(torch.tensor([0, 1]), torch.tensor([7, 8]), torch.tensor([1, -1]), None)
    predicted = relay.predict_step(batch, 0)
    torch.testing.assert_close(predicted.stages["a"], relay.sample([7, 8], torch.tensor([1, -1])), rtol=0, atol=0)


def test_final_images_have_the_memory_layout_of_image_files():
    """So no writer rearranges pixels."""
    relay = Relay({"a": tiny_stage(4)})
    images = relay.predict_step(
        SampleBatch(torch.arange(2), torch.tensor([7, 8]), torch.tensor([1, -1]), None), 0
    ).images
    assert images.permute(0, 2, 3, 1).is_contiguous()


def test_a_relay_of_later_stages_starts_from_given_images():
    stage = tiny_stage(8, 2)
    relay = Relay({"b": stage, "c": tiny_stage(24, 3)})
    assert relay.start_size == (4, 4)
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    batch = SampleBatch(torch.tensor([5, 6]), torch.tensor([1, 2]), torch.tensor([0, 1]), pixels)
    samples = relay.predict_step(batch, 0)
    assert list(samples.stages) == ["start", "b", "c"]
    assert samples.positions.tolist() == [5, 6]
    alone = stage.sample((2, 3, 8, 8), [1, 2], torch.tensor([0, 1]), to_float(pixels))
    torch.testing.assert_close(samples.stages["b"], alone, rtol=0, atol=0)
    assert torch.equal(samples.images, to_uint8(samples.stages["c"]))


def test_a_relay_without_its_first_stage():
    stages = {"a": tiny_stage(4), "b": tiny_stage(8, 2), "c": tiny_stage(24, 3)}
    relay = Relay(stages, rounding="floor", postprocess=lambda x: x, consistency=True, tile=24, overlap=12)
    relay.to("meta")
    later = relay.without_first()
    assert list(later.chain().values()) == [stages["b"], stages["c"]]
    assert (later.start_size, later.resolution, later.device.type) == ((4, 4), 24, "meta")
    assert (later.rounding, later.postprocess, later.consistency) == ("floor", relay.postprocess, True)
    assert later.describe_tiles() == {name: relay.describe_tiles()[name] for name in ("b", "c")}
    assert later.describe_tiles() != Relay({"b": stages["b"], "c": stages["c"]}).describe_tiles()
    with pytest.raises(UserError, match=r"^relay\.stages is empty"):
        Relay({"a": stages["a"]}).without_first()


def test_an_unknown_rounding_is_named():
    with pytest.raises(ValueError, match=r"^rounding=up: use nearest or floor"):
        Relay({"a": tiny_stage(4)}, rounding="up")


def test_rounding_and_postprocessing_of_the_final_images():
    images = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    floor = Relay({"a": tiny_stage(4)}, rounding="floor").finish(images)
    assert torch.equal(floor, (127.5 * (images + 1)).floor().to(torch.uint8))
    assert 0 < (Relay({"a": tiny_stage(4)}).finish(images) != floor).double().mean() < 0.9
    changed = Relay({"a": tiny_stage(4)}, postprocess=lambda pixels: 255 - pixels)
    assert torch.equal(changed.finish(images), 255 - to_uint8(images))


def test_early_hand_over_stops_the_first_stage_and_counts_saved_evaluations():
    first = tiny_stage(4)
    whole = first.sampler
    relay = Relay({"a": first, "b": tiny_stage(8, 2)}, hand_over_sigma=1.0)
    assert relay.samplers["a"].sigmas[-2] == 1.0
    described = relay.describe()
    assert described["hand_over_sigma"] == 1.0
    assert relay.saved_evaluations == whole.evaluations - relay.samplers["a"].evaluations == 0
    assert described["stages"]["a"]["network_evaluations"] == 5
    early = Relay({"a": first}, hand_over_sigma=10.0)
    assert early.saved_evaluations == 2
    assert early.describe()["stages"]["a"]["network_evaluations"] == 3


def test_a_relay_leaves_its_stages_as_they_are():
    first, second = tiny_stage(4), tiny_stage(8, 2)
    own = [(stage, stage.sampler, stage.training) for stage in (first, second)]
    before, given = first.sample((1, 3, 4, 4), [7]), {"a": first, "b": second}
    early = Relay(given, hand_over_sigma=10.0)
    assert not torch.equal(early.sample_stages([7])["a"], before)  # stopped at sigma 10
    assert torch.equal(Relay(given).sample_stages([7])["a"], before)  # another relay of the same stages is not
    assert torch.equal(first.sample((1, 3, 4, 4), [7]), before)
    assert [(stage, stage.sampler, stage.training) for stage in (first, second)] == own
    assert given == {"a": first, "b": second}


def test_a_sampler_replaced_in_a_stage_is_the_one_that_samples_and_is_described():
    first = tiny_stage(4, info=StageInfo({"sampler": {"steps": 3}}))
    relay = Relay({"a": first}, hand_over_sigma=1.0)
    before = relay.sample([7])
    assert relay.describe()["stages"]["a"]["sampler"] == {"steps": 3}
    with pytest.raises(TypeError):
        relay.samplers["a"] = EDMSampler(steps=5)  # would have no effect
    first.sampler = EDMSampler(steps=5, churn=2.0)
    assert relay.samplers["a"].evaluations == first.sampler.stopping_at(1.0).evaluations
    assert not torch.equal(relay.sample([7]), before)
    described = relay.describe()["stages"]["a"]["sampler"]
    assert described["_target_"] == "relay_diffusion.samplers.edm.EDMSampler"
    assert (described["churn"], described["sigmas"]) == (0.4, first.sampler.sigmas)


def test_a_sampler_replaced_in_a_stage_is_checked_before_it_samples():
    first = tiny_stage(4)
    first.sampler = tiny_stage(8, 2).sampler
    for draw in (lambda: first.sample((1, 3, 4, 4), [0]), lambda: Relay({"a": first}).sample([0])):
        with pytest.raises(ValueError, match=r"^sampler=BlurringSampler: starts from images"):
            draw()


@pytest.mark.parametrize(
    ("result", "found"),
    [(lambda start: start[..., :2], r"shape \(1, 3, 4, 2\)"), (lambda start: None, "type NoneType")],  # noqa: ARG005
)
def test_a_sampler_that_returns_other_images_is_named(result, found):
    relay = Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2)})
    sampler = lambda denoise, start, randn_like, labels=None: result(start)  # noqa: ARG005, E731
    with relay.changed({"a": sampler}), pytest.raises(UserError, match=rf"^sampler=function: its result has {found}"):
        relay.sample([0])


def test_changes_of_a_missing_stage_are_refused():
    relay = Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2)})
    for changes in ({"samplers": {"c": EDMSampler()}}, {"guidance_scales": {"c": 2.0}}):
        with pytest.raises(UserError, match=r"no stage c; its stages are a, b$"), relay.changed(**changes):
            pass


def test_observers_see_each_evaluation_of_each_stage():
    relay, seen = Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2)}), []
    before = relay.sample([7, 8])
    relay.observers.append(lambda stage, *tensors: seen.append((stage, *(part.shape for part in tensors))))
    assert torch.equal(relay.sample([7, 8]), before)
    small, large = (2, 3, 4, 4), (2, 3, 8, 8)
    expected = [("a", small, (2,), small)] * relay.samplers["a"].evaluations
    assert seen == expected + [("b", large, (2,), large)] * relay.samplers["b"].evaluations


def test_a_sampler_that_cannot_stop_early_is_named():
    first = tiny_stage(4)
    first.sampler = lambda denoise, start, randn_like, labels=None: start  # noqa: ARG005
    with pytest.raises(UserError, match=r"the function of relay\.stages\.a cannot stop early"):
        Relay({"a": first}, hand_over_sigma=1.0)


@pytest.mark.parametrize("name", ["pop", "keys", "training", "a.b"])
def test_a_stage_may_have_any_name(name):
    relay = Relay({name: tiny_stage(4), "next": tiny_stage(8, 2)})
    assert list(relay.chain()) == [name, "next"]
    assert list(relay.sample_stages([0], torch.tensor([1]))) == [name, "next"]


@pytest.mark.parametrize(("stage", "sigma"), [((4, 1), 100.0), ((8, 2), 1.0)])
def test_an_invalid_hand_over_is_refused(stage, sigma):
    with pytest.raises(UserError, match="hand_over_sigma"):
        Relay({"a": tiny_stage(*stage)}, hand_over_sigma=sigma)


def test_consistent_stages_keep_the_block_means_of_their_input():
    stages = {"a": tiny_stage(4), "b": tiny_stage(8, 2), "c": tiny_stage(24, 3)}
    free, tied = Relay(stages).sample_stages([0, 1]), Relay(stages, consistency=True).sample_stages([0, 1])
    assert torch.equal(tied["a"], free["a"])  # starts from noise
    for name, before, block in (("b", "a", 2), ("c", "b", 3)):
        small = tied[before].clamp(-1, 1)
        torch.testing.assert_close(block_mean(tied[name], block), small, atol=1e-5, rtol=0)
        assert (block_mean(free[name], block) - free[before].clamp(-1, 1)).abs().max() > 0.1
    given = torch.rand(2, 3, 4, 4)
    enlarged = Relay({"b": stages["b"]}, consistency=True).sample([0, 1], start=given)
    torch.testing.assert_close(block_mean(enlarged, 2), given, atol=1e-5, rtol=0)


def test_after_an_early_hand_over_the_block_means_are_those_of_the_estimate():
    stages = {"a": tiny_stage(4), "b": tiny_stage(8, 2)}
    early = Relay(stages, hand_over_sigma=10.0, consistency=True).sample_stages([0])
    assert not torch.equal(early["a"], Relay(stages).sample_stages([0])["a"])
    torch.testing.assert_close(block_mean(early["b"], 2), early["a"].clamp(-1, 1), atol=1e-5, rtol=0)


def test_observers_see_consistent_estimates():
    relay, seen = Relay({"b": tiny_stage(8, 2)}, consistency=True), []
    relay.observers.append(lambda stage, x, sigma, estimate: seen.append(block_mean(estimate, 2)))  # noqa: ARG005
    start = torch.rand(1, 3, 4, 4)
    relay.sample([0], start=start)
    assert len(seen) == relay.samplers["b"].evaluations
    for means in seen:
        torch.testing.assert_close(means, start, atol=1e-5, rtol=0)


def test_consistency_is_described_if_set():
    stages = {"a": tiny_stage(4), "b": tiny_stage(8, 2)}
    assert Relay(stages, consistency=True).describe()["consistency"] is True
    assert "consistency" not in Relay(stages).describe()  # as in the settings of earlier versions


def test_consistency_without_an_input_is_refused():
    with pytest.raises(UserError, match=r"^relay\.consistency=true: no stage of this relay enlarges images; use false"):
        Relay({"a": tiny_stage(4)}, consistency=True)
    with pytest.raises(ValueError, match=r"^consistency=True: this stage starts from noise; use False"):
        tiny_stage(4).sample((1, 3, 4, 4), [0], consistency=True)
