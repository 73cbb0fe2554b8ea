"""Compare samplers at equal numbers of network evaluations."""

import pytest

from relay_diffusion.app.comparing import can_compare, compare, samplers_to_compare, with_evaluations
from relay_diffusion.app.drawing import DrawOptions
from relay_diffusion.app.jobs import Job
from relay_diffusion.app.stage_settings import StageSettings
from relay_diffusion.checkpoints.loading import load_relay
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from relay_diffusion.samplers import BlurringSampler, EDMSampler, MultistepSampler
from support import tiny_stage


@pytest.mark.parametrize("evaluations", [3, 11])
def test_both_samplers_have_the_wanted_number_of_evaluations(relay, evaluations):
    kinds = set()
    for stage in relay.chain().values():
        for settings in samplers_to_compare(stage).values():
            sampler = with_evaluations(stage, settings, evaluations)
            assert sampler.evaluations == evaluations
            kinds.add(type(sampler))
    assert kinds == {MultistepSampler, EDMSampler, BlurringSampler}


def test_a_stage_keeps_the_noise_levels_of_its_multistep_sampler(exported):
    sampler = {"_target_": "relay_diffusion.samplers.MultistepSampler", "sigma_min": 0.05, "sigma_max": 50.0}
    stage = load_relay(exported, samplers={"base": sampler}).chain()["base"]
    found = with_evaluations(stage, samplers_to_compare(stage)["Multistep"], 5)
    assert (round(found.sigmas[0], 6), round(found.sigmas[-1], 6)) == (50.0, 0.05)


def test_the_networks_are_evaluated_equally_often(relay):
    job, counts = Job(), {}

    def count(stage, x, *_):
        counts[stage] = counts.get(stage, 0) + len(x)

    relay.tile_observers.append(count)
    try:
        options = DrawOptions(seeds="0-1", stages={"base": StageSettings(guidance_scale=2.0)})
        results = compare(relay, options, {"base": 5, "relay": 3}, job)
    finally:
        relay.tile_observers.remove(count)
    assert [result.title for result in results] == ["Multistep", "Second order"]
    assert all(result.drawing.evaluations == {"base": 5, "relay": 3} for result in results)
    assert counts == {"base": 2 * 2 * 5, "relay": 2 * 2 * 3}
    assert job.done == job.total == 2 * 2 * 8
    first, second = (result.drawing for result in results)
    assert first.captions == second.captions
    assert first.images[0].tobytes() != second.images[0].tobytes()


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [(4, "second-order samplers need an odd number"), (1, "must lie between 3 and 47"), (99, "between 3 and 47")],
)
def test_other_numbers_are_refused(relay, evaluations, message):
    with pytest.raises(UserError, match=message):
        compare(relay, DrawOptions(seeds="0"), {"base": evaluations, "relay": 3})


def test_relays_that_cannot_be_compared(relay):
    assert can_compare(relay)
    assert not can_compare(Relay({"base": tiny_stage(8)}))  # built, not loaded: no config
    assert not can_compare(Relay({"relay": relay.chain()["relay"]}))  # starts from images
