"""Where sampled images are kept, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from relay_diffusion.data.convert import ImageZipWriter, encode_png
from relay_diffusion.data.images import decode_bytes
from relay_diffusion.data.sources import LABEL_FILE
from relay_diffusion.errors import UserError
from relay_diffusion.files import whole_file, write_text


class ImageStore:
    """Images by name in `directory`/images, one PNG each; `pack` moves them into `directory`/images.zip.

    `settings` (what determines the images) are kept beside them. Raises UserError if the directory already
    holds images of other settings.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any]) -> None:
        directory = Path(directory)
        self.folder, self.archive = directory / "images", directory / "images.zip"
        self._settings_file = directory / "settings.json"
        self._settings = json.dumps(settings, indent=1, sort_keys=True, default=str)
        if self._settings_file.exists() and self._settings_file.read_text() != self._settings:
            raise UserError(f"{directory} holds images of other settings (settings.json): choose another output")
        self._packed: set[str] = set()
        if self.archive.exists():
            with self._open() as archive:
                self._packed = set(archive.namelist())

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.archive)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self.archive} cannot be read ({error}): delete it or choose another output") from None

    def begin(self) -> None:
        """Create the folder and note the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._settings_file, self._settings)

    def path(self, name: str) -> Path:
        """The file of an image that is not packed."""
        return self.folder / f"{name}.png"

    def __contains__(self, name: str) -> bool:
        return f"{name}.png" in self._packed or self.path(name).exists()

    def write(self, name: str, image: Tensor) -> None:
        """Keep one uint8 image [3,H,W]; it is there whole or not at all."""
        with whole_file(self.path(name)) as file:
            file.write(encode_png(Image.fromarray(image.permute(1, 2, 0).cpu().numpy())))

    def encoded(self, names: Sequence[str]) -> Iterator[bytes]:
        """The PNG bytes of images, in order."""
        if not self._packed:
            yield from (self.path(name).read_bytes() for name in names)
            return
        with self._open() as archive:
            for name in names:
                member = f"{name}.png"
                yield archive.read(member) if member in self._packed else self.path(name).read_bytes()

    def batches(self, names: Sequence[str], batch_size: int) -> Iterator[Tensor]:
        """Images in order: uint8 [B,3,H,W]."""
        batch: list[Tensor] = []
        for name, content in zip(names, self.encoded(names), strict=True):
            batch.append(decode_bytes(content, str(self.path(name))))
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)

    def pack(self, names: Sequence[str], labels: Sequence[int], class_names: Sequence[str] | None) -> None:
        """Move all images into one zip with their classes (dataset.json); what was packed before stays in it."""
        known = {f"{name}.png": label for name, label in zip(names, labels, strict=True)}
        if self._packed:
            with self._open() as archive:
                stored = json.loads(archive.read(LABEL_FILE))["labels"] or []
            known = dict(stored) | known if stored else dict.fromkeys(self._packed - {LABEL_FILE}, -1) | known
        members = sorted(known)
        contents = self.encoded([member.removesuffix(".png") for member in members])
        with ImageZipWriter(self.archive, list(class_names) if class_names is not None else None) as writer:
            for member, content in zip(members, contents, strict=True):
                writer.add_encoded(member, content, known[member] if class_names is not None else None)
        self._packed = {*members, LABEL_FILE}
        shutil.rmtree(self.folder)
