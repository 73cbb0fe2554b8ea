"""Images of any size to enlarge."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor

from relay_diffusion.data.captions import read_captions
from relay_diffusion.data.decode import ALPHA
from relay_diffusion.data.image_sets import channels_text, digest, image_tensor, note_ignored
from relay_diffusion.data.labels import read_labels
from relay_diffusion.data.sources import open_source
from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.utils.parallel import map_in_order
from relay_diffusion.utils.resolution import Size


class StartImages:
    """Images of any size, sorted by name, in sRGB.

    Items are (uint8 [C,h,w], class index or -1). Colors of RGBA are premultiplied (`utils.alpha`).
    path: an image zip, a folder (searched recursively) of PNG, WebP and JPEG files, or one such file. subset: a folder
    inside `path`; "" selects everything. apply_exif: apply the EXIF orientation. channels: C, 1 (grayscale), 3 (RGB) or
    4 (RGBA), to which images are converted. labels: read classes from dataset.json if it has any. option: the user's
    name of `path`, for messages. Attributes: `names` [N], `labels` [N] (-1: no class), `class_names`, `captions` [N],
    `sizes` [N], (h, w) by the headers; `turned`, `composited` and `unprofiled`: names of the images that this process
    has turned so far, whose transparency it has composited on white, and whose ICC profile is damaged.
    Raises UserError that names the option and the image.
    """

    def __init__(
        self,
        path: str | Path,
        subset: str = "",
        apply_exif: bool = True,
        channels: int = 3,
        labels: bool = False,
        option: str = "relay.start",
    ) -> None:
        source = open_source(path, option)
        self.path, self.names, self.subset = source.path, source.names_in(subset), subset.strip("/")
        found = read_labels(source) if labels else None
        self.class_names: list[str] = found.class_names if found else []
        self.labels = [found.by_name[name] if found else NO_CLASS for name in self.names]
        self.turned: set[str] = set()
        self.composited: set[str] = set()
        self.unprofiled: set[str] = set()
        self._source, self._apply_exif, self._channels = source, apply_exif, channels
        note_ignored(source, subset)
        self.sizes: list[Size] = list(map_in_order(lambda name: source.size(name, apply_exif), self.names))

    @cached_property
    def captions(self) -> list[list[str]]:
        """Captions of every image [N] from dataset.json.

        An empty list for an image without captions.
        """
        found = read_captions(self._source)
        return [found.get(name, []) for name in self.names]

    @cached_property
    def source_hash(self) -> str:
        """Hash of names, contents, subset, use of EXIF and channels (hexadecimal)."""
        files = (f"{name}\n{self._source.fingerprint(name)}\n" for name in self.names)
        return digest([f"{self.subset}\n{self._apply_exif}\n{channels_text(self._channels)}\n", *files])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.names[index]
        decoded = self._source.decoded(name, self._apply_exif, self._channels, apply_profile=True)
        if decoded.turned:
            self.turned.add(name)
        if ALPHA in decoded.conversions:
            self.composited.add(name)
        if decoded.profile_damaged:
            self.unprofiled.add(name)
        return image_tensor(decoded.image), self.labels[index]
