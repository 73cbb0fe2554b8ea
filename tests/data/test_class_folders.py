"""Class folders below wrapping folders and splits."""

from __future__ import annotations

import pytest

from relay_diffusion.data.class_folders import SPLITS, find_class_folders
from relay_diffusion.errors import UserError

SPLIT_SET = ["train/cat/a.png", "train/dog/b.png", "train/dog/c.png", "val/cat/d.png", "val/dog/e.png"]


FOUND = {  # case: (names of images, class_level, class names, written names)
    "classes": (["cat/a.png", "dog/b.png"], None, ["cat", "dog"], ["cat/a.png", "dog/b.png"]),
    "one wrapper": (["w/cat/a.png", "w/dog/b.png"], None, ["cat", "dog"], ["cat/a.png", "dog/b.png"]),
    "three wrappers": (["a/b/c/cat/a.png", "a/b/c/dog/b.png"], None, ["cat", "dog"], ["cat/a.png", "dog/b.png"]),
    "one class": (["cat/a.png", "cat/b.png"], None, ["cat"], ["cat/a.png", "cat/b.png"]),
    "wrapped class": (["w/cat/a.png"], None, ["cat"], ["cat/a.png"]),
    "class of folders": (["cat/x/a.png"], 1, ["cat"], ["cat/x/a.png"]),
    "nested folders in a class": (["cat/a.png", "cat/x/b.png", "dog/c.png"], None, ["cat", "dog"], None),
    "splits": (SPLIT_SET, None, ["cat", "dog"], SPLIT_SET),
    "wrapped splits": ([f"w/{name}" for name in SPLIT_SET], None, ["cat", "dog"], SPLIT_SET),
    "one split": (["imagenet/train/n01440764/x.png"], None, ["n01440764"], ["train/n01440764/x.png"]),
    "wrappers in the splits": (
        ["train/images/cat/a.png", "train/images/dog/b.png", "val/images/cat/c.png"],
        None,
        ["cat", "dog"],
        ["train/cat/a.png", "train/dog/b.png", "val/cat/c.png"],
    ),
    "other classes in each split": (["train/cat/a.png", "val/dog/b.png"], None, ["cat", "dog"], None),
    "splits in capitals": (["Train/cat/a.png", "VAL/cat/b.png"], None, ["cat"], None),
    "a class called train": (["bus/a.png", "train/b.png"], None, ["bus", "train"], None),
    "splits as classes": (SPLIT_SET, 1, ["train", "val"], SPLIT_SET),
    "a given level": (["x/usa/cat/a.png", "x/peru/dog/b.png"], 3, ["cat", "dog"], ["usa/cat/a.png", "peru/dog/b.png"]),
}


@pytest.mark.parametrize("case", FOUND)
def test_class_folders(case: str) -> None:
    names, level, classes, written = FOUND[case]
    found = find_class_folders(names, level, repr)
    assert found.class_names == classes
    assert [found.short_names[name] for name in names] == (written or names)


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_every_split_is_recognized(split: str) -> None:
    found = find_class_folders([f"{split}/cat/a.png", f"{split}/dog/b.png", "train/cat/c.png"], None, repr)
    assert (found.class_names, found.splits) == (["cat", "dog"], sorted({split, "train"}))


REFUSED = {
    "in no folder": (["a.png", "cat/b.png"], None, "^'a.png' is in no folder; use classes=none"),
    "beside the splits": (["a.png", "train/cat/b.png"], None, "^'a.png' is in no folder; use classes=none"),
    "flat splits": (
        ["test/a.png", "train/b.png"],
        None,
        "^'test/a.png' is in the split folder 'test', but in no",
    ),
    "a flat split": (["test/a.png", "train/cat/b.png"], None, "^'test/a.png' is in the split folder 'test', but in no"),
    "split beside others": (
        ["extra/a.png", "train/cat/b.png"],
        None,
        "^'train' is named like a split .*level=2",
    ),
    "beside class folders": (["w/a.png", "w/cat/b.png"], None, "^'w' contains everything, but also images .*level=1"),
    "too deep a level": (["cat/a.png", "dog/x/b.png"], 2, "^'cat/a.png' is in 1 folder, but class_level=2$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_can_be_understood_in_two_ways_are_refused(case: str) -> None:
    names, level, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        find_class_folders(names, level, repr)
