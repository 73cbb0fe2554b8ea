"""Detection of class folders, split folders and wrapping folders."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from relay_diffusion.errors import UserError

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "heldout"}  # in any case

Folders = tuple[str, ...]  # folders of one image, the outermost first


@dataclass(frozen=True)
class ClassFolders:
    """Classes of images by their folders.

    level: depth of the class folders, 1 is the outermost. wrappers: folders that contain everything, left out of the
    short names. splits: the split folders, sorted. class_of, short_names: by the name of each image. nested: classes
    whose images are all in sub-folders.
    """

    level: int
    wrappers: list[str]
    splits: list[str]
    class_of: dict[str, str]
    short_names: dict[str, str]
    nested: list[str]

    @property
    def class_names(self) -> list[str]:
        """Classes of all splits, sorted."""
        return sorted(set(self.class_of.values()))


def find_class_folders(names: Sequence[str], class_level: int | None, where: Callable[[str], str]) -> ClassFolders:
    """Find the class folders of images.

    They are at `class_level`, or at the first level below wrapping and split folders. A folder is a wrapper if it is
    the only one at its level and contains folders, but no image. Folders are splits if each folder at their level has
    the name of a split. where: names an image or folder in messages. Raises UserError for an image in no class folder,
    and for ambiguous folders.
    """
    folders = {name: tuple(name.split("/")[:-1]) for name in names}
    last = sys.maxsize if class_level is None else class_level - 1
    outer = _skip_wrappers(folders.values(), 0, last)
    groups: dict[str, list[Folders]] = defaultdict(list)
    for path in folders.values():
        if len(path) > outer:
            groups[path[outer]].append(path)
    splits = sorted(groups) if outer < last and all(_is_split(folder) for folder in groups) else []
    inner = _skip_wrappers(folders.values(), outer + 1, last) if splits else outer
    level = inner if class_level is None else class_level - 1
    if class_level is None and not splits:
        _refuse_some_splits(groups, outer, where)
    for name, path in folders.items():
        if len(path) <= level:
            raise UserError(f"{where(name)} {_why_no_class(path, splits, outer, class_level)}")
    direct = {path[level] for path in folders.values() if len(path) == level + 1}
    classes = {path[level] for path in folders.values()}
    if class_level is None and len(classes) == len(direct) == 1 and max(map(len, folders.values())) > level + 1:
        raise UserError(
            f"{where(min(classes))} contains everything, but also images beside folders: "
            f"class_level={level + 1} takes it as the only class; or move its images into class folders"
        )
    any_path = next(iter(folders.values()))
    kept = {name: (*path[outer : outer + bool(splits)], *path[inner:]) for name, path in folders.items()}
    return ClassFolders(
        level=level + 1,
        wrappers=[*any_path[:outer], *any_path[outer + bool(splits) : inner]],
        splits=splits,
        class_of={name: path[level] for name, path in folders.items()},
        short_names={name: "/".join((*path, name.rpartition("/")[2])) for name, path in kept.items()},
        nested=sorted(classes - direct),
    )


def _is_split(folder: str) -> bool:
    return folder.lower() in SPLITS


def _skip_wrappers(paths: Collection[Folders], level: int, last: int) -> int:
    """Return the first level without a single folder that contains everything.

    From `level` to `last`.
    """
    while level < last and all(len(path) > level + 1 for path in paths):  # no image is in that folder or beside it
        folders = {path[level] for path in paths}
        if len(folders) > 1 or any(map(_is_split, folders)):
            break
        level += 1
    return level


def _refuse_some_splits(groups: Mapping[str, Sequence[Folders]], level: int, where: Callable[[str], str]) -> None:
    """Raise UserError for split folders beside folders with other names.

    Only if the split folders contain folders, as splits do.
    """
    for folder, group in groups.items():
        if _is_split(folder) and all(len(path) > level + 1 for path in group):
            other = next(name for name in groups if not _is_split(name))
            raise UserError(
                f"{where(folder)} is named like a split and holds folders, but {other!r} is beside it: "
                f"class_level={level + 1} takes both as classes, class_level={level + 2} the folders in them"
            )


def _why_no_class(path: Folders, splits: Sequence[str], outer: int, class_level: int | None) -> str:
    if class_level is not None:
        return f"is in {len(path) or 'no'} folder{'s' * (len(path) > 1)}, but class_level={class_level}"
    if len(path) > outer and splits:
        return (
            f"is in the split folder {path[outer]!r}, but in no class folder: use classes=none, or a source whose "
            f"splits all hold class folders (class_level={outer + 1}: {', '.join(splits)} are the classes)"
        )
    return "is in no folder; use classes=none"
