from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from make_emoji import GROUPS_MEMBER, EmojiOptions, base_emoji, build, read_groups, subset_of
from pictures_on_disk import encoded, write_tar
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError

DEMO = Path(__file__).parents[2] / "demo" / "emoji-64.zip"
SIZES = {
    "activities": 85,
    "animals-nature": 157,
    "food-drink": 128,
    "objects": 261,
    "people-body": 1881,
    "smileys-emotion": 167,
    "symbols": 224,
    "travel-places": 218,
}
GROUPS = {"👍": "People & Body", "❤️": "Smileys & Emotion", "🇫🇷": "Flags", "🐷": "Animals & Nature"}
FILES = ["1f44d", "1f44d-1f3fb", "1f44d-1f3ff", "2764-fe0f", "1f1eb-1f1f7", "1f437", "0023-fe0f-20e3"]


def tarballs(tmp_path: Path) -> EmojiOptions:
    picture = encoded(Image.new("RGBA", (16, 24), (255, 0, 0, 51)), "WEBP", lossless=True)
    images = {f"package/assets/{name}.webp": picture for name in FILES} | {"package/package.json": b"{}"}
    groups = {emoji: {"group": group, "name": "?"} for emoji, group in GROUPS.items()}
    return EmojiOptions(
        images=str(write_tar(tmp_path / "images.tgz", images, "w:gz")),
        groups=str(write_tar(tmp_path / "groups.tgz", {GROUPS_MEMBER: json.dumps(groups).encode()}, "w:gz")),
        destination=str(tmp_path / "emoji.zip"),
        resolution=4,
    )


def test_small_tarballs(tmp_path: Path) -> None:
    options = tarballs(tmp_path)
    result = build(options)
    assert result.images_per_class == {"animals-nature": 1, "people-body": 3, "smileys-emotion": 1}
    assert (result.flags, result.unmatched) == (1, ["0023-fe0f-20e3"])
    dataset = ImageDataset(options.destination, 4)
    assert dataset.class_names == ["animals-nature", "people-body", "smileys-emotion"]
    stems = [Path(name).stem for name in dataset.names]
    assert sorted(stems) == sorted([*FILES[:4], "1f437"])
    assert {stem: label for stem, (_, label) in zip(stems, dataset, strict=True)}["1f44d-1f3fb"] == 1
    assert dataset[0][0][:, 0, 0].tolist() == [255, 204, 204]  # on white
    assert sum(name.startswith("heldout/") for name in dataset.names) == result.heldout


def test_same_tarballs_same_bytes(tmp_path: Path) -> None:
    options = tarballs(tmp_path)
    build(options)
    first = Path(options.destination).read_bytes()
    with pytest.raises(UserError, match=r"destination=.*emoji\.zip: exists already; .* overwrite=true"):
        build(options)
    options.overwrite = True
    build(options)
    assert Path(options.destination).read_bytes() == first


@pytest.mark.parametrize("swap", ["groups", "images"])
def test_wrong_tarball_is_named(tmp_path: Path, swap: str) -> None:
    options = tarballs(tmp_path)
    if swap == "groups":
        options.groups = options.images
    else:
        options.images = options.groups
    with pytest.raises(UserError, match=f"{swap}="):
        build(options)


def test_a_damaged_groups_tarball_is_named(tmp_path: Path) -> None:
    path = Path(tarballs(tmp_path).groups)
    whole, messages = path.read_bytes(), []
    for position in range(len(whole)):
        for bit in (0, 5):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            try:
                read_groups(path)  # a bit that says nothing, such as of the time
            except UserError as error:
                messages.append(str(error))
    assert set(messages) == {f"groups={path}: damaged, or not the npm tarball with {GROUPS_MEMBER}; fetch it again"}
    assert len(messages) > len(whole)
    write_tar(path, {GROUPS_MEMBER: json.dumps({"🐷": {"group": 3}}).encode()}, "w:gz")
    with pytest.raises(UserError, match="groups="):
        read_groups(path)


def test_variants_share_base_and_subset() -> None:
    assert base_emoji("1f9d4-1f3fd-200d-2642-fe0f") == "1f9d4-200d-2642"
    for base in ("1f44d", "1f9d4", "1f46d"):
        assert len({subset_of(f"{base}{tone}") for tone in ("", "-fe0f", "-1f3fb", "-1f3ff")}) == 1


def test_demo_zip_facts() -> None:
    dataset = ImageDataset(DEMO, 64)
    assert len(dataset) == 3121
    labels = [label for _, label in (dataset[index] for index in (0, -1))]
    assert all(0 <= label < 8 for label in labels)
    assert dict(Counter(dataset.class_names[label] for label in dataset.labels)) == SIZES
    bases: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for name in dataset.names:
        subset, stem = name.removesuffix(".webp").split("/")
        assert subset == subset_of(stem)
        bases[subset].add(base_emoji(stem))
    assert not bases["train"] & bases["heldout"]
    assert len(ImageDataset(DEMO, 64, subset="heldout")) == 326
    corners = np.stack([dataset[index][0][:, 0, 0].numpy() for index in range(0, 3121, 100)])
    assert (corners == 255).mean() > 0.9  # on white


@pytest.mark.skipif(
    not {"EMOJI_IMAGES", "EMOJI_GROUPS"} <= set(os.environ), reason="set EMOJI_IMAGES and EMOJI_GROUPS to the tarballs"
)
def test_real_tarballs_make_the_demo_zip(tmp_path: Path) -> None:
    options = EmojiOptions(os.environ["EMOJI_IMAGES"], os.environ["EMOJI_GROUPS"], str(tmp_path / "emoji-64.zip"), 64)
    result = build(options)
    assert result.images_per_class == SIZES
    assert (result.heldout, result.flags, len(result.unmatched)) == (326, 253, 17)
    ours, demo = ImageDataset(options.destination, 64), ImageDataset(DEMO, 64)
    # the demo is stored as WebP, which takes minutes to write: other endings, the same pixels
    assert [name.removesuffix(".png") for name in ours.names] == [name.removesuffix(".webp") for name in demo.names]
    assert all((a == b).all() and x == y for (a, x), (b, y) in zip(ours, demo, strict=True))
