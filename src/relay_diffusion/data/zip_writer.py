"""Image zips: uncompressed PNG members, and their classes and captions in dataset.json."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from relay_diffusion.data.sources import LABEL_FILE
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import atomic_write, sync

EPOCH = (1980, 1, 1, 0, 0, 0)  # fixed time stamp: the same images give the same bytes


class ImageZipWriter:
    """Writer of an image zip; created by `image_zip`."""

    def __init__(self, archive: zipfile.ZipFile, what: str, class_names: list[str] | None) -> None:
        self._archive, self._what, self.class_names = archive, what, class_names
        self.labels: dict[str, int | None] = {}  # label of every written image, in order
        self.captions: dict[str, list[str]] = {}  # captions of the images that have some

    def add(self, name: str, image: Image.Image, label: int | None = None, captions: Sequence[str] = ()) -> None:
        """Add one image as a PNG.

        label: index into the class names, None without classes. captions: any number.
        """
        self.add_encoded(name, encode_png(image), label, captions)

    def add_encoded(self, name: str, content: bytes, label: int | None = None, captions: Sequence[str] = ()) -> None:
        """Add one encoded image; not thread-safe.

        Images can be encoded in threads. Raises UserError if the name exists already.
        """
        if name in self.labels:
            raise UserError(f"{self._what}: two images would be named {name!r}; rename one")
        assert (label is None) == (self.class_names is None), "all images have a label, or none has"
        assert label is None or 0 <= label < len(self.class_names or ()), f"no class {label}"
        self.labels[name] = label
        if captions:
            self.captions[name] = list(captions)
        self._write(name, content)

    def drop_empty_classes(self) -> None:
        """Remove the classes without images; the others keep their order."""
        if self.class_names is not None:
            used = sorted({label for label in self.labels.values() if label is not None})
            self.class_names = [self.class_names[label] for label in used]
            self.labels = {name: used.index(label) for name, label in self.labels.items() if label is not None}

    def write_labels(self) -> None:
        """Add dataset.json; call it once, at the end."""
        content: dict[str, object] = {"labels": None}
        if self.class_names is not None:
            content = {"labels": list(self.labels.items()), "classes": self.class_names}
        if self.captions:
            content["captions"] = list(self.captions.items())
        self._write(LABEL_FILE, json.dumps(content).encode())

    def _write(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name, EPOCH)
        info.create_system, info.external_attr = 3, 0o644 << 16  # identical on every operating system
        self._archive.writestr(info, data)


@contextmanager
def image_zip(
    destination: str | Path, class_names: list[str] | None = None, option: str = "destination"
) -> Iterator[ImageZipWriter]:
    """Write an image zip atomically.

    PNG members without compression, and dataset.json when the block ends. The same images in the same order give the
    same bytes. `option` is the user's name of the destination. Raises UserError that names it when it is not a .zip
    name, cannot be written or is on a full disk, and when a name occurs twice.
    """
    path, what = Path(destination).expanduser(), f"{option}={destination}"
    if path.suffix != ".zip":
        raise UserError(f"{what}: the name must end in .zip")
    with atomic_write(path, what) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        writer = ImageZipWriter(archive, what, class_names)
        yield writer
        writer.write_labels()
    sync(path.parent)  # users may delete the source of the images after this


def encode_png(image: Image.Image, level: int = 6, text: Mapping[str, str] | None = None) -> bytes:
    """Encode an image as PNG.

    level: of zlib, 0 (no compression) to 9. 9 takes about seven times as long as 6 for files that are 4 % smaller.
    text: text chunks by their keyword; None: none.
    """
    stream, chunks = BytesIO(), PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_text(keyword, value)  # as UTF-8 (iTXt) where Latin-1 does not suffice
    image.save(stream, "PNG", compress_level=level, pnginfo=chunks)
    return stream.getvalue()


def png_names(names: Sequence[str]) -> dict[str, str]:
    """Map names of images to PNG names.

    a/x.jpg -> a/x.png; but x.jpg beside x.png -> x.jpg.png and x.png.png.
    """
    stems = {name: str(PurePosixPath(name).with_suffix("")) for name in names}
    uses = Counter(stems.values())
    return {name: f"{stem if uses[stem] == 1 else name}.png" for name, stem in stems.items()}
