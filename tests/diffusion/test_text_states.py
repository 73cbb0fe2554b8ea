"""Rows of encoded prompts: selection, dropping, padding, concatenation, checks."""

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from relay_diffusion.diffusion.guidance import drop_conditions
from relay_diffusion.diffusion.text_states import TextStates, check_text, concatenate, no_text
from text_rows import random_text


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([2, 0]), slice(1, 3)])
def test_rows_are_selected_in_order(rows):
    text = random_text([1, 2, 3])
    assert_equal(text.select(rows), [part[rows] for part in text])
    assert isinstance(text.select(rows), TextStates)


def test_dropped_rows_are_rows_without_text():
    text = random_text([1, 2, 3])
    dropped = text.drop(torch.tensor([True, False, True]))
    assert dropped.mask.sum(1).tolist() == [0, 2, 0]
    assert dropped.pooled.any(1).tolist() == [False, True, False]
    assert_equal(dropped.select([1]), text.select([1]))
    assert text.mask.sum(1).tolist() == [1, 2, 3]  # unchanged


def test_concatenation_pads_to_the_longest():
    parts = random_text([1, 2], tokens=2), random_text([4], tokens=4), no_text(1, 6)
    whole = concatenate(parts)
    assert [tuple(part.shape) for part in whole] == [(4, 4, 6), (4, 4), (4, 6)]
    assert whole.mask.sum(1).tolist() == [1, 2, 4, 0]
    assert torch.equal(whole.tokens[:2, :2], parts[0].tokens)
    assert_equal(whole.select([2]), parts[1])
    assert not whole.pooled[3].any()


def test_class_and_text_are_dropped_for_the_same_images():
    labels, text = torch.arange(2000), random_text([2] * 2000)
    torch.manual_seed(0)
    kept, without = drop_conditions(labels, text, 0.3)
    assert torch.equal(kept < 0, ~without.mask.any(1))
    assert torch.equal(kept < 0, ~without.pooled.any(1))
    assert (kept < 0).double().mean().item() == pytest.approx(0.3, abs=0.052)  # five standard errors
    torch.manual_seed(0)
    assert torch.equal(drop_conditions(labels, None, 0.3)[0], kept)  # text draws no other random numbers


def test_trainers_move_text_to_the_device():
    images, text = move_data_to_device((torch.zeros(1), random_text([2])), torch.device("meta"))
    assert isinstance(text, TextStates)
    assert {part.device.type for part in (images, *text)} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "a cat", "text is str: must be TextStates"),
        (lambda text: text.select([0, 1]), "text has 2 rows: must have 3"),
        (lambda text: text._replace(mask=text.mask.long()), "torch.int64 of shape"),
        (lambda text: text._replace(mask=text.mask[:, 1:]), "must be floats"),
        (lambda text: text._replace(pooled=text.pooled[:, 1:]), "must be floats"),
        (lambda text: text._replace(tokens=text.tokens.long()), "must be floats"),
    ],
)
def test_text_of_other_types_and_shapes_is_refused(change, message):
    text = random_text([1, 2, 3])
    check_text("text", text, 3)
    with pytest.raises(ValueError, match=message):
        check_text("text", change(text), 3)
