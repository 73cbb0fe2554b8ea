"""Relays: what fits, what does not, and what comes out."""

import pytest
import torch

from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.errors import UserError
from relay_diffusion.relay import Relay
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
        ({"b": (8, 2, 2)}, "must start from noise"),
        ({"a": (4, 1, 2), "b": (4, 1, 2)}, "b starts from noise"),
        ({"a": (4, 1, 2), "b": (16, 2, 2)}, "16x16 from images 2 times smaller.*a makes 4x4"),
        ({"a": (4, 1, 2), "b": (8, 2, 3)}, "3 classes"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, message):
    built = {name: tiny_stage(*arguments) for name, arguments in stages.items()}
    with pytest.raises(UserError, match=message):
        Relay(built)


def test_stages_of_other_classes_are_refused():
    small, large = tiny_stage(4), tiny_stage(8, 2)
    small.class_names, large.class_names = ["cat", "dog"], ["dog", "cat"]
    with pytest.raises(UserError, match="other names or order"):
        Relay({"a": small, "b": large})


def test_classes_are_refused_by_an_unconditional_relay():
    relay = Relay({"a": tiny_stage(4, num_classes=0)})
    with pytest.raises(UserError, match="unconditional"):
        relay.sample([0], torch.tensor([1]))
    assert relay.sample([0], torch.tensor([-1])).shape == (1, 3, 4, 4)


def test_predict_step_is_sampling():
    relay = Relay({"a": tiny_stage(4)})
    predicted = relay.predict_step((torch.tensor([7, 8]), torch.tensor([1, -1])), 0)
    torch.testing.assert_close(predicted["a"], relay.sample([7, 8], torch.tensor([1, -1])), rtol=0, atol=0)
