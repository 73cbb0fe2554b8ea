"""Values, suggestions and differences in messages."""

import pytest
import torch

from relay_diffusion.utils.messages import did_you_mean, differences, first_difference, shorten, shown_path


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


def test_values_that_cannot_be_printed_are_shortened():
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


def test_paths_are_relative_only_inside_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert shown_path(tmp_path / "inside/a/b") == shown_path("a/b") == "a/b"
    assert shown_path("..a/b") == "..a/b"
    assert shown_path("../b") == shown_path(tmp_path / "b") == str(tmp_path / "b")


def test_differences_lists_every_leaf_that_differs():
    before = {"a": {"b": 1, "c": 2}, "d": 3, "e": {"f": 4}, "h": None}
    now = {"a": {"b": 1, "c": 5}, "e": None, "g": 6, "h": None}
    expected = [("a.c", 2, 5), ("d", 3, "not set"), ("e", {"f": 4}, None), ("g", "not set", 6)]
    assert list(differences(before, now)) == expected
    assert list(differences(before, before)) == []


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b was 1, is 2"),
        ({}, {"a": {"_target_": "package.Sampler"}}, "a was not set, is Sampler"),
        ({"a": {"b": 2}}, {}, "a was {'b': 2}, is not set"),
        ({"a": None}, {}, "a was None, is not set"),
        ({"a": "x\x1b[2J"}, {"a": "y"}, r"a was x\x1b[2J, is y"),  # a file's content is escaped
    ],
)
def test_the_first_difference_is_described(before, now, text):
    assert first_difference(before, now) == text


def test_unicode_letters_are_shown():
    assert shorten("Häuser & Gärten") == "Häuser & Gärten"
