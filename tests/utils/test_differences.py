"""What differs between two settings, in words."""

from relay_diffusion.utils.differences import differences, first_difference
from relay_diffusion.utils.messages import shorten


def test_every_leaf_that_differs():
    there = {"a": {"b": 1, "c": 2}, "d": 3, "e": {"f": 4}}
    here = {"a": {"b": 1, "c": 5}, "e": None, "g": 6}
    assert list(differences(there, here)) == [("a.c", 2, 5), ("d", 3, None), ("e", {"f": 4}, None), ("g", None, 6)]
    assert list(differences(there, there)) == []


def test_the_first_one_in_words():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 there, 2 here"
    assert first_difference({}, {"a": {"b": 2}}) == "a is missing there"
    assert first_difference({"a": {"b": 2}}, {}) == "a is there, but not here"


def test_what_a_file_holds_does_not_reach_the_screen_as_it_is():
    assert first_difference({"a": "x\x1b[2J"}, {"a": "y"}) == r"a is x\x1b[2J there, y here"
    assert shorten("Häuser & Gärten") == "Häuser & Gärten"
