"""Malformed captions: one short line that names the entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pictures_on_disk import pngs, write_zip
from relay_diffusion.data.captions import MAX_CAPTIONS, MAX_LENGTH
from relay_diffusion.data.convert import Captions, Classes, ConvertOptions, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError

SIDE = 8
NAMES = ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("", "not valid JSON"),
        ("\ufeff{", "not valid JSON"),
        ('{"captions": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
        ("[]", "must be an object"),
        ({"captions": "a.png"}, '"captions" must be a list'),
        ({"captions": {"a.png": "an apple"}}, '"captions" must be a list'),
        ({"captions": [["c.png", "x"]]}, "captions[0] is for 'c.png', which is not among the images"),
        ({"captions": [["a.png", "x"], ["a.png", "y"]]}, "captions[1] repeats 'a.png'; remove one entry"),
        ({"captions": [["a.png"]]}, "captions[0] = ['a.png'] must be [name, caption or list of captions]"),
        ({"captions": [["a.png", "x", "y"]]}, "captions[0] ="),
        ({"captions": [["a.png", None]]}, "captions[0] ="),
        ({"captions": [["a.png", 3]]}, "captions[0] ="),
        ({"captions": [["a.png", {"text": "x"}]]}, "captions[0] ="),
        ({"captions": [[0, "a.png"]]}, "captions[0] ="),
        ({"captions": ["ab"]}, "captions[0] ="),
        ({"captions": [None]}, "captions[0] = None must be"),
        ({"captions": [["a.png", ["x", 3]]]}, "captions[0], 'a.png': the caption 3 must be text"),
        ({"captions": [["a.png", [["x"]]]]}, "the caption ['x'] must be text"),
        ({"captions": [["a.png", ["x"] * (MAX_CAPTIONS + 1)]]}, "1,001 captions; use at most 1,000"),
        ({"captions": [["a.png", "x" * (MAX_LENGTH + 1)]]}, "a caption has 10,001 characters; use at most 10,000"),
        ({"captions": [["a.png", "x" * 10**7]]}, "a caption has 10,000,000 characters"),
        ({"captions": [["a.png", "x\0y"]]}, "contains NUL or a lone surrogate"),
        ('{"captions": [["a.png", "\\ud800"]]}', "contains NUL or a lone surrogate"),
    ],
)
def test_malformed_captions_are_one_short_line(tmp_path: Path, dataset: object, message: str) -> None:
    path = write_zip(tmp_path / "in.zip", pngs(NAMES), dataset)
    with pytest.raises(UserError) as caught:
        ImageDataset(path, SIDE, labels=False).captions  # noqa: B018
    text = str(caught.value)
    assert text.startswith(f"data.dataset.path={path}: dataset.json")
    assert message in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 250
    with pytest.raises(UserError, match=r"dataset\.json"):
        convert(ConvertOptions(str(path), str(tmp_path / "out.zip"), SIDE, classes=Classes.none))
    assert not (tmp_path / "out.zip").exists()


def test_captions_at_the_limits(tmp_path: Path) -> None:
    entries = [["a.png", ["x"] * MAX_CAPTIONS], ["b.png", "\u00e4" * MAX_LENGTH + "\n"]]
    dataset = ImageDataset(write_zip(tmp_path / "in.zip", pngs(NAMES), {"captions": entries}), SIDE)
    assert [len(captions) for captions in dataset.captions] == [MAX_CAPTIONS, 1]


@pytest.mark.parametrize(
    ("captions", "name", "content", "message"),
    [
        (Captions.txt, "a.txt", b"\xff\xfe\0", "'a.txt' in .*: is not UTF-8"),
        (Captions.txt, "a.txt", b"x\0y", "'a.txt' in .*: the caption 'x.x00y' contains NUL"),
        (Captions.txt, "a.txt", b"x\n" * (MAX_CAPTIONS + 1), "1,001 captions"),
        (Captions.metadata, "metadata.csv", b"", "captions_column=text: is no column"),
        (Captions.metadata, "metadata.csv", b"name,text\na.png,x\n", "line 2: no text in the column 'file_name'"),
        (Captions.metadata, "metadata.csv", b"file_name,text\na.png,x,y\n", "line 2: more fields than columns"),
        (Captions.metadata, "metadata.csv", b'file_name,text\na.png,"x', "unexpected end of data"),
        (Captions.metadata, "metadata.csv", b"file_name,text\na.png," + b"x" * 200_000, "field larger than"),
        (Captions.metadata, "metadata.jsonl", b"\n[1]\n", "line 2: .1. must be an object"),
        (Captions.metadata, "metadata.jsonl", b"{", "line 1: is not valid JSON"),
        (Captions.metadata, "metadata.jsonl", b'{"file_name": 3, "text": "x"}', "line 1: no text in the column"),
        (Captions.metadata, "metadata.jsonl", b'{"file_name": "a.png", "text": 3}', "the caption 3 must be text"),
    ],
)
def test_malformed_caption_files_of_a_source(
    tmp_path: Path, captions: Captions, name: str, content: bytes, message: str
) -> None:
    source = write_zip(tmp_path / "in.zip", pngs(NAMES) | {name: content})
    options = ConvertOptions(str(source), str(tmp_path / "out.zip"), SIDE, classes=Classes.none, captions=captions)
    with pytest.raises(UserError, match=message) as caught:
        convert(options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must be an object"),
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff", "is not UTF-8"),
        (b'{"a.png": 3}', "'a.png': the caption 3 must be text"),
        (b'{"a.png": "\\udfff"}', "contains NUL or a lone surrogate"),
        (json.dumps({"\0": "x"}).encode(), "none of 2 images has a caption"),
    ],
)
def test_malformed_json_files(tmp_path: Path, content: bytes, message: str) -> None:
    source, file = write_zip(tmp_path / "in.zip", pngs(NAMES)), tmp_path / "captions.json"
    file.write_bytes(content)
    options = ConvertOptions(str(source), str(tmp_path / "out.zip"), SIDE, classes=Classes.none)
    options.captions, options.captions_file = Captions.json, str(file)
    with pytest.raises(UserError, match=message):
        convert(options)


def test_a_folder_as_captions_file(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "in.zip", pngs(NAMES))
    options = ConvertOptions(str(source), str(tmp_path / "out.zip"), SIDE, classes=Classes.none)
    options.captions, options.captions_file = Captions.json, str(tmp_path)
    with pytest.raises(UserError, match=r"captions_file=.*: it is not a regular file"):
        convert(options)
