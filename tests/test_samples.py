"""Seeds, classes, and the folder that keeps sampled images."""

import pytest

from relay_diffusion.errors import UserError
from relay_diffusion.samples import ImageFolder, choose_labels, parse_seeds


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("5", [5]), (7, [7]), ("0-1,9", [0, 1, 9]), ([1, 2], [1, 2])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "0-2,1", "1.5", 1.5, None])
def test_seeds_that_make_no_sense(text):
    with pytest.raises(UserError, match="seed"):
        parse_seeds(text)


def test_classes_go_round_by_seed():
    assert choose_labels([0, 1, 2, 5], None, 3, []) == [0, 1, 2, 2]
    assert choose_labels([0, 1], None, 0, []) == [-1, -1]
    assert choose_labels([0, 1], "cat", 2, ["dog", "cat"]) == [1, 1]
    assert choose_labels([4], 1, 2, []) == [1]


@pytest.mark.parametrize(
    ("chosen", "classes", "names", "message"),
    [
        ("cat", 0, [], "unconditional"),
        ("cow", 2, ["dog", "cat"], "dog, cat"),
        (2, 2, [], "0 to 1"),
    ],
)
def test_unknown_classes(chosen, classes, names, message):
    with pytest.raises(UserError, match=message):
        choose_labels([0], chosen, classes, names)


def test_a_folder_is_continued_only_with_its_own_settings(tmp_path):
    folder = ImageFolder(tmp_path / "images", {"steps": 5})
    folder.begin()
    folder.path(1001).parent.mkdir()
    folder.path(1001).touch()
    again = ImageFolder(tmp_path / "images", {"steps": 5})
    assert again.missing([1000, 1001, 1002]) == [1000, 1002]
    with pytest.raises(UserError, match="other settings"):
        ImageFolder(tmp_path / "images", {"steps": 6})
