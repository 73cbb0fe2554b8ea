"""Image zips: uncompressed PNG members and their classes in dataset.json."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType

from PIL import Image

from relay_diffusion.data.sources import LABEL_FILE
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import sync, temporary_name, writing

EPOCH = (1980, 1, 1, 0, 0, 0)  # one time stamp for all members, so that the same images give the same bytes


class ImageZipWriter:
    """Writes an image zip: uncompressed PNG members and dataset.json; a context manager.

    The zip appears at `destination` when the block ends well and not at all otherwise. The same images in the same
    order give the same bytes. `option` is what the user calls the destination. Errors: UserError that names it when it
    is no .zip name, cannot be written or is on a full disk, and when a name comes twice.
    """

    def __init__(
        self, destination: str | Path, class_names: list[str] | None = None, option: str = "destination"
    ) -> None:
        self.destination = Path(destination).expanduser()
        self._called = f"{option}={destination}"
        if self.destination.suffix != ".zip":
            raise UserError(f"{self._called}: the name must end in .zip")
        self.class_names = class_names
        self.labels: dict[str, int | None] = {}  # of every image written, in order
        self._temporary = temporary_name(self.destination)

    def __enter__(self) -> ImageZipWriter:
        with writing(self._called):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._zip = zipfile.ZipFile(self._temporary, "w", zipfile.ZIP_STORED)
        return self

    def add(self, name: str, image: Image.Image, label: int | None = None) -> None:
        """Add one picture as a PNG; `label` is an index into the class names, None when there are none."""
        self.add_encoded(name, encode_png(image), label)

    def add_encoded(self, name: str, content: bytes, label: int | None = None) -> None:
        """Add one picture that is encoded already (encoding can run in threads, this cannot)."""
        if name in self.labels:
            raise UserError(f"{self._called}: two images would be named {name!r}")
        assert (label is None) == (self.class_names is None), "all images have a label, or none has"
        assert label is None or 0 <= label < len(self.class_names or ()), f"no class {label}"
        self.labels[name] = label
        self._write(name, content)

    def drop_empty_classes(self) -> None:
        """Forget the classes that no image has so far; the others keep their order."""
        if self.class_names is not None:
            used = sorted({label for label in self.labels.values() if label is not None})
            self.class_names = [self.class_names[label] for label in used]
            self.labels = {name: used.index(label) for name, label in self.labels.items() if label is not None}

    def _write(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name, EPOCH)
        info.create_system, info.external_attr = 3, 0o644 << 16  # the same on every operating system
        with writing(self._called):
            self._zip.writestr(info, data)

    def _dataset_json(self) -> str:
        if self.class_names is None:
            return json.dumps({"labels": None})
        return json.dumps({"labels": list(self.labels.items()), "classes": self.class_names})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with writing(self._called):
                with self._zip:
                    if kind is None:
                        self._write(LABEL_FILE, self._dataset_json().encode())
                if kind is None:
                    sync(self._temporary)  # what it was made of may be deleted after this
                    self._temporary.replace(self.destination)
                    sync(self.destination.parent)
        finally:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)


def encode_webp(image: Image.Image) -> bytes:
    """Lossless WebP bytes at the highest effort: a fifth smaller than PNG, much slower to write."""
    stream = BytesIO()
    image.save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes, at zlib's default effort: the highest takes four times as long for 2 % less."""
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def png_names(names: Sequence[str]) -> dict[str, str]:
    """Names of images -> as PNG: a/x.jpg -> a/x.png; but x.jpg beside x.png -> x.jpg.png and x.png.png."""
    stems = {name: str(PurePosixPath(name).with_suffix("")) for name in names}
    uses = Counter(stems.values())
    return {name: f"{stem if uses[stem] == 1 else name}.png" for name, stem in stems.items()}
