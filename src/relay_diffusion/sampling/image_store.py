"""Store sampled images, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from relay_diffusion.data.decode import MODES, decode
from relay_diffusion.data.image_sets import ArraySet, ImageSet, image_tensor
from relay_diffusion.data.npz import Npz, write_adm_samples
from relay_diffusion.data.sources import LABEL_FILE
from relay_diffusion.data.zip_writer import encode_png, image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import atomic_write, json_text, remove_temporaries, write_text
from relay_diffusion.utils.messages import first_difference, shorten
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.pictures import pil_image

OPTIONS = {  # options of sample.py by their keys in settings.json, for messages
    "classes": "class",
    "device": "trainer.accelerator",
    "precision": "trainer.precision",
    "text.prompts": "prompt",
    "text.negative_prompt": "negative_prompt",
}


class ImageStore:
    """Folder of PNG files, `directory`/images, or `directory`/images.zip.

    `pack` moves the files into the zip. `settings`: all settings that the images depend on; they are written to the
    directory. `compression`: zlib's level for new images. `channels`: of the images; a PNG has 1, 3 or 4, and images of
    other channels are files of `write_adm_samples`, which are not packed. Raises UserError, naming the first
    difference, if the directory holds images of other settings.

    An image file is complete or absent if a run is killed. Files are not synced one by one, which is slow: a power
    failure can leave the latest ones damaged. Files with a wrong checksum count as absent. The zip is synced before the
    files are deleted.
    """

    def __init__(
        self, directory: str | Path, settings: Mapping[str, Any], compression: int = 4, channels: int = 3
    ) -> None:
        directory, self.compression, self.channels = Path(directory), compression, channels
        self.suffix = ".png" if channels in MODES else ".npz"
        self.folder, self.archive = directory / "images", directory / "images.zip"
        self._settings_file = directory / "settings.json"
        self._settings = json.loads(json_text(settings))
        if self._settings_file.exists() and (self.archive.exists() or self._loose()):
            known = _read_json(self._settings_file)
            if known != self._settings:
                difference = first_difference(known, self._settings, OPTIONS)
                raise UserError(f"{directory} holds images with different settings ({difference}): use another output")
        self._packed: set[str] = set()
        if self.archive.exists():
            with self._open() as archive:
                self._packed = set(archive.namelist()) - {LABEL_FILE}

    def begin(self) -> None:
        """Create the folder, write the settings and delete stale temporary files. Call on rank 0 before writing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        write_text(self._settings_file, json_text(self._settings))

    def path(self, name: str) -> Path:
        """Return the path of an image that is not packed."""
        return self.folder / f"{name}{self.suffix}"

    def __contains__(self, name: str) -> bool:
        return f"{name}{self.suffix}" in self._packed or _is_intact(self.path(name))

    def write(self, name: str, image: Tensor, text: Mapping[str, str] | None = None) -> None:
        """Write one uint8 image [C,H,W] atomically. Thread-safe.

        text: text chunks of a PNG by their keyword; other files have none.
        """
        if self.suffix == ".npz":
            size = image.shape[1], image.shape[2]
            write_adm_samples(self.path(name), [image[None]], 1, size, channels=self.channels, synced=False)
            return
        with atomic_write(self.path(name), synced=False) as file:
            file.write(encode_png(pil_image(image), self.compression, text))

    def read(self, name: str, archive: zipfile.ZipFile | None) -> Tensor:
        """Return an image, uint8 [C,H,W]."""
        if self.suffix == ".npz":
            return ArraySet(Npz(self.path(name), "output"), None, self.channels).tensor(0)
        data, where = self.encoded(name, archive), str(self.path(name))
        return image_tensor(decode(data, where, channels=self.channels).image)

    def images(self, names: Sequence[str], resolution: tuple[int, int]) -> ImageSet:
        """Return the named images of the store, in this order."""
        return _KeptImages(self, names, resolution)

    @contextmanager
    def reading(self) -> Iterator[zipfile.ZipFile | None]:
        """Open the zip for `encoded`; None if nothing is packed."""
        if not self._packed:
            yield None
            return
        with self._open() as archive:
            yield archive

    def encoded(self, name: str, archive: zipfile.ZipFile | None) -> bytes:
        """Return the PNG bytes of an image."""
        member = f"{name}{self.suffix}"
        packed = archive is not None and member in self._packed
        return archive.read(member) if archive is not None and packed else self.path(name).read_bytes()

    def note_labels(
        self, labels: Mapping[str, int], class_names: Sequence[str], captions: Mapping[str, str] | None = None
    ) -> None:
        """Write the class labels and captions of images (by name) to dataset.json.

        Labels are written only if every image in the folder has one; -1 is no label. A blank caption is none.
        """
        loose = sorted(self._loose())
        if not loose:
            return  # packed images have their labels in the zip
        known = self._labels() | {f"{name}{self.suffix}": label for name, label in labels.items()}
        texts = self._captions() | {f"{name}{self.suffix}": [text] for name, text in (captions or {}).items()}
        content: dict[str, Any] = {"labels": None}
        if all(known.get(member, -1) >= 0 for member in loose):
            content = {"labels": [[member, known[member]] for member in loose], "classes": list(class_names)}
        if captioned := [[member, texts[member]] for member in loose if any(map(str.strip, texts.get(member, [])))]:
            content["captions"] = captioned
        if content == {"labels": None}:
            (self.folder / LABEL_FILE).unlink(missing_ok=True)
            return
        write_text(self.folder / LABEL_FILE, json.dumps(content))

    def pack(self) -> None:
        """Move all images into one zip.

        Captions are included, and labels if all images have one. Images in an existing zip are kept. Call on rank 0
        after all ranks have written.
        """
        self._clear()
        damaged = [member for member in self._loose() if not _is_intact(self.folder / member)]
        for member in damaged:
            (self.folder / member).unlink()
        if damaged:
            print(f"note: damaged images are deleted and not packed: {shorten(', '.join(damaged))}", flush=True)
        loose = self._loose()
        if loose:
            self._add_to_zip(loose)
        for member in loose:
            (self.folder / member).unlink()
        (self.folder / LABEL_FILE).unlink(missing_ok=True)
        for root, _, _ in os.walk(self.folder, topdown=False):
            if not os.listdir(root):  # noqa: PTH208
                Path(root).rmdir()

    def _add_to_zip(self, loose: list[str]) -> None:
        labels, class_names, captions = self._labels(), self._class_names(), self._captions()
        members = sorted({*self._packed, *loose})
        classed = class_names is not None and all(labels.get(member, -1) >= 0 for member in members)
        with (
            self.reading() as archive,
            image_zip(self.archive, class_names if classed else None, option="output") as writer,
        ):
            contents = map_in_order(lambda member: self.encoded(member.removesuffix(".png"), archive), members)
            for member, content in zip(members, contents, strict=True):
                writer.add_encoded(member, content, labels[member] if classed else None, captions.get(member, []))
        self._packed = set(members)

    def _clear(self) -> None:
        remove_temporaries([*self.folder.rglob(".*"), *self.folder.parent.glob(".*")])

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.archive)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self.archive} cannot be read ({error}): delete it or choose another output") from None

    def _loose(self) -> list[str]:
        """Return the names of the image files in the folder."""
        files = (path.relative_to(self.folder) for path in self.folder.rglob(f"*{self.suffix}"))
        return [path.as_posix() for path in files if not path.name.startswith(".")]

    def _noted(self) -> list[dict[str, Any]]:
        """Read the dataset.json of the zip and that of the folder."""
        noted = []
        with self.reading() as archive:
            if archive is not None and LABEL_FILE in archive.namelist():
                noted.append(json.loads(archive.read(LABEL_FILE)))
        if (self.folder / LABEL_FILE).exists():
            noted.append(_read_json(self.folder / LABEL_FILE))
        return noted

    def _labels(self) -> dict[str, int]:
        return {name: label for content in self._noted() for name, label in content.get("labels") or []}

    def _captions(self) -> dict[str, list[str]]:
        return {name: texts for content in self._noted() for name, texts in content.get("captions") or []}

    def _class_names(self) -> list[str] | None:
        return next((content["classes"] for content in self._noted() if content.get("classes")), None)


class _KeptImages(ImageSet):
    """Image set of a store."""

    kind = "run"

    def __init__(self, store: ImageStore, names: Sequence[str], resolution: tuple[int, int]) -> None:
        super().__init__(store.channels)
        self.store, self.names, self.resolution, self.path = store, names, resolution, store.folder

    @property
    def source_hash(self) -> str:
        """Return "": the settings of the run identify the images."""
        return ""

    def digest(self, header: str) -> str:  # noqa: ARG002
        """Return "", as `source_hash`."""
        return ""

    def tensors(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield images, uint8 [C,H,W]."""
        with self.store.reading() as archive:
            yield from map_in_order(lambda index: self.store.read(self.names[index], archive), indices)


def _is_intact(path: Path) -> bool:
    """Return whether an image file exists and its checksums hold."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, zipfile.BadZipFile):  # SyntaxError: Pillow's error for a wrong checksum
        return False
    return True


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: delete it or choose another output") from None
