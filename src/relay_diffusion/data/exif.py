"""EXIF orientation of an image, found without trusting the block that holds it.

Pillow's own reader warns of damaged blocks through the process-wide filters, which threads cannot change safely.
"""

from __future__ import annotations

import struct

from PIL import Image

ORIENTATION = 0x0112
SHORT, LONG = 3, 4  # TIFF types
APP1 = 0xE1  # JPEG marker of the segment that holds EXIF
END_OF_HEADERS = (b"", b"\xff", b"\xd9", b"\xda")  # after a 0xff: nothing, padding, end of image, start of scan
PREFIX = b"Exif\0\0"
TURNS = {  # orientation: what brings the stored pixels upright (EXIF 2.32, table 6)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(block: bytes) -> int:
    """Orientation 1..8 in an EXIF block; 1 where it has none. Raises ValueError for a damaged block."""
    tiff = block.removeprefix(PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise ValueError("no TIFF header")
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, at)
            if tag == ORIENTATION:
                if kind not in (SHORT, LONG) or count != 1:
                    raise ValueError("the orientation is no number")
                (value,) = struct.unpack_from(f"{order}{'H' if kind == SHORT else 'I'}", tiff, at + 8)
                return value if value in TURNS else 1
    except struct.error as error:
        raise ValueError("cut short") from error
    return 1


def hide_jpeg_exif(data: bytes) -> tuple[bytes, bytes]:
    """(JPEG whose EXIF segments are renamed, the first EXIF block); other bytes come back as they are."""
    renamed, block, at = bytearray(), b"", 2
    while data.startswith(b"\xff\xd8") and data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in END_OF_HEADERS:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == APP1 and data.startswith(PREFIX, at + 4, end):
            block, renamed = block or data[at + 4 : end], renamed or bytearray(data)
            renamed[at + 4 : at + 8] = b"none"  # Pillow reads the block for the resolution, and warns of damage
        at = end
    return bytes(renamed or data), block
