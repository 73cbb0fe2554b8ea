"""Images of any size to enlarge: sizes, colors, headers."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from relay_diffusion.data.color import to_srgb
from relay_diffusion.data.start_images import StartImages
from relay_diffusion.errors import UserError


@pytest.fixture(scope="module")
def exchanged():
    """An ICC profile in which red and blue are exchanged: sRGB with two entries of its tag table swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    entries = {bytes(profile[at : at + 4]): at + 4 for at in range(132, 132 + 12 * count, 12)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
    return bytes(profile)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (10, 14, 4)).astype(np.uint8)


def difference(image, expected):
    return np.abs(np.asarray(image).astype(int) - expected.astype(int)).max()


def test_colors_are_converted_by_their_profile(exchanged, pixels):
    rgb = pixels[..., :3]
    assert difference(to_srgb(Image.fromarray(rgb), exchanged), rgb[..., ::-1]) <= 1
    converted = to_srgb(Image.fromarray(pixels), exchanged)
    assert converted.mode == "RGBA"
    assert difference(converted, pixels[..., [2, 1, 0, 3]]) <= 1
    palette = Image.fromarray(rgb).convert("P")
    assert difference(to_srgb(palette, exchanged), np.asarray(palette.convert("RGB"))[..., ::-1]) <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK"])
def test_a_profile_of_another_color_space_is_an_error(exchanged, pixels, mode):
    with pytest.raises(ValueError, match="damaged, or of another color space"):
        to_srgb(Image.fromarray(pixels).convert(mode), exchanged)


def test_gray_is_converted_by_gray_profiles(pixels):
    gray = Image.fromarray(pixels[..., 0])
    converted = to_srgb(gray, gray_profile())
    assert converted.mode == "RGB"
    assert difference(converted, np.repeat(pixels[..., :1], 3, axis=2)) > 10  # gamma 1, so that sRGB is brighter
    assert np.asarray(converted).min() >= 0
    with_alpha = Image.merge("LA", [gray, Image.fromarray(pixels[..., 3])])
    assert difference(to_srgb(with_alpha, gray_profile()), np.dstack([np.asarray(converted), pixels[..., 3]])) == 0


def gray_profile():
    """A gray ICC profile of gamma 1, as the specification (ICC.1:2010, 8.5) asks for at least."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"g\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(4) + struct.pack(">I", 0),
    }
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">2I", start + len(data), len(content))
        data += content
    size = start + len(data)
    header = struct.pack(">I4sI4s4s4s12s4s", size, b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", bytes(12), b"acsp")
    header += bytes(68 - len(header)) + struct.pack(">3i", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + data


def test_items_are_upright_and_in_srgb(exchanged, pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to turn clockwise
    rgb = pixels[..., :3]
    Image.fromarray(rgb).save(tmp_path / "b.png", icc_profile=exchanged, exif=exif)
    (tmp_path / "a").mkdir()
    Image.fromarray(rgb).save(tmp_path / "a/c.webp", lossless=True)
    Image.fromarray(rgb).save(tmp_path / "odd.png", icc_profile=b"nonsense")
    images = StartImages(tmp_path)
    assert images.names == ["a/c.webp", "b.png", "odd.png"]
    assert images.sizes == [(10, 14), (14, 10), (10, 14)]
    upright = np.rot90(rgb[..., ::-1], -1)
    assert difference(images[1][0].permute(1, 2, 0), upright) <= 1
    assert [tuple(images[k][0].shape[1:]) for k in range(3)] == images.sizes
    assert (images.turned, images.unprofiled) == ({"b.png"}, {"odd.png"})
    stored = StartImages(tmp_path, apply_exif=False)
    assert stored.sizes == [(10, 14)] * 3
    assert stored.source_hash != images.source_hash == StartImages(tmp_path).source_hash


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_items_have_the_wanted_channels(pixels, tmp_path, channels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, label = StartImages(tmp_path / "a.png", channels=channels)[0]
    assert (tuple(image.shape), label) == ((channels, 10, 14), -1)


def test_headers_of_other_files_are_reported(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    with pytest.raises(UserError, match=r"^start: 'a\.png' in .*; save it as PNG or replace it, or remove it$"):
        StartImages(tmp_path, option="start")
