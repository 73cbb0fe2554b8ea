"""Values and suggestions in messages."""

import pytest
import torch

from relay_diffusion.utils.messages import did_you_mean, shorten


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\n b\t", "a b"),
        ("x\x1b[2J", r"x\x1b[2J"),
        ("x" * 100, "x" * 77 + "..."),
        (torch.zeros(2, 3), "(2, 3)"),
        ([1, None], "[1, None]"),
    ],
)
def test_a_value_is_one_short_printable_line(value, text):
    assert shorten(value) == text


def test_values_that_python_does_not_write_are_shortened():
    assert shorten(10**5000) == "..."
    nested = []
    for _ in range(10**5):
        nested = [nested]
    assert shorten(nested) == "..."


def test_the_nearest_name_is_suggested_or_all_are_listed():
    assert did_you_mean("step", ["steps", "rho"]) == "; did you mean steps?"
    assert did_you_mean("ANIMALS", ["animals", "food"]) == "; did you mean animals?"
    assert did_you_mean("xyz", ["steps", "rho"]) == "; available: steps, rho"
    assert did_you_mean("xyz", ["steps"], "; none") == "; none"
    assert did_you_mean("xyz", []) == ""
