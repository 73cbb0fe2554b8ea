"""When a multiple of so many images has been passed."""

from __future__ import annotations


class Every:
    """True once for each `images` images that went by; 0 means never."""

    def __init__(self, images: int) -> None:
        self.images, self._last = images, 0

    def start(self, images_seen: int) -> None:
        """Begin to count at `images_seen` (a resumed run)."""
        self._last = images_seen

    def __call__(self, images_seen: int) -> bool:
        """Whether a multiple was reached since the last call."""
        if self.images <= 0:
            return False
        passed = images_seen // self.images > self._last // self.images
        self._last = images_seen
        return passed
