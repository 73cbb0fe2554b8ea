"""Malformed dataset.json: one short line that names the entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pictures_on_disk import encoded, pixels, pngs, write_zip
from relay_diffusion.data.convert import Classes, ConvertOptions, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError

SIDE = 8

NAMES = ["a.png", "b.png"]
GOOD = [["a.png", 0], ["b.png", 1]]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("\ufeff{", "not valid JSON"),
        ('{"labels": [["a.png", 1' + "0" * 5000 + "]]}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"labels": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
        ("[]", 'must be an object with the key "labels"'),
        ("3", 'must be an object with the key "labels"'),
        ({"labels": "a.png"}, '"labels" must be a list'),
        ({"labels": 3}, '"labels" must be a list'),
        ({"labels": []}, "no entry for 'a.png'"),
        ({"labels": [GOOD[0]]}, "no entry for 'b.png'"),
        ({"labels": [*GOOD, ["c.png", 0]]}, "labels[2] is for 'c.png', which is not among the images"),
        ({"labels": [*GOOD, GOOD[0]]}, "labels[2] repeats 'a.png'; remove one entry"),
        ({"labels": [["a.png"]]}, "labels[0] = ['a.png'] must be [name, class index]"),
        ({"labels": [["a.png", 0, 0]]}, "labels[0] ="),
        ({"labels": [[0, "a.png"]]}, "labels[0] ="),
        ({"labels": [{"a.png": 0}]}, "labels[0] ="),
        ({"labels": [None]}, "labels[0] = None must be"),
        ({"labels": [["a.png", -1]]}, "class -1 must be 0..999999"),
        ({"labels": [["a.png", 10**6]]}, "class 1000000 must be 0..999999"),
        ({"labels": [["a.png", 10**4000]]}, "must be 0..999999"),
        ({"labels": [["a.png", 0.0]]}, "labels[0] = ['a.png', 0.0] must be"),
        ('{"labels": [["a.png", NaN]]}', "labels[0] = ['a.png', nan] must be"),
        ({"labels": [["a.png", "0"]]}, "labels[0] = ['a.png', '0'] must be"),
        ({"labels": [["a.png", None]]}, "labels[0] ="),
        ({"labels": [["a.png", [[[[[[[[[]]]]]]]]]]]}, "labels[0] ="),
        ({"labels": [["a.png", "x" * 10_000]]}, "labels[0] ="),
        ({"labels": GOOD, "classes": ["one"]}, "class 1 must be 0..0"),
        ({"labels": GOOD, "classes": []}, "no class is named"),
        ({"labels": GOOD, "classes": [1, 2]}, '"classes" must be a list of class names'),
        ({"labels": GOOD, "classes": {"0": "one"}}, '"classes" must be a list of class names'),
    ],
)
def test_malformed_labels_are_one_short_line(tmp_path: Path, dataset: object, message: str) -> None:
    path = write_zip(tmp_path / "in.zip", pngs(NAMES), dataset)
    with pytest.raises(UserError) as caught:
        ImageDataset(path, SIDE)
    text = str(caught.value)
    assert text.startswith(f"data.dataset.path={path}: dataset.json")
    assert message in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 250
    with pytest.raises(UserError, match=r"dataset\.json"):
        convert(ConvertOptions(str(path), str(tmp_path / "out.zip"), SIDE, classes=Classes.keep))
    assert not (tmp_path / "out.zip").exists()


def test_labels_that_are_no_text(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "in.zip", pngs(NAMES) | {"dataset.json": b"\xff\xfe\x00"})
    with pytest.raises(UserError, match=r"dataset\.json is not valid JSON"):
        ImageDataset(path, SIDE)


def test_the_first_unknown_image_among_many_labels_is_named(tmp_path: Path) -> None:
    labels = json.dumps({"labels": [["a.png", 0]] + [[f"{k}.png", 0] for k in range(200_000)]})
    path = write_zip(tmp_path / "in.zip", {"a.png": encoded(pixels(0))}, labels)
    with pytest.raises(UserError, match=r"labels\[1\] is for '0\.png'"):
        ImageDataset(path, SIDE)
