"""Image sets: folders, zips and ADM samples in order, by index, of one size; and inconsistent files."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.npz import Npz
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError


def pixels(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def write_folder(path: Path, images: np.ndarray) -> Path:
    for index, image in enumerate(images):
        (path / "sub").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / "sub" / f"{index:03d}.png")
    return path


def write_zip(path: Path, images: np.ndarray) -> Path:
    with image_zip(path.with_suffix(".zip")) as archive:
        for index, image in enumerate(images):
            archive.add(f"sub/{index:03d}.png", Image.fromarray(image))
    return path.with_suffix(".zip")


def write_npz(path: Path, images: np.ndarray) -> Path:
    np.savez(path.with_suffix(".npz"), images)
    return path.with_suffix(".npz")


def write_deflated(path: Path, images: np.ndarray) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), images, np.arange(len(images)))
    return path.with_suffix(".npz")


WRITERS = {"folder": write_folder, "zip": write_zip, "npz": write_npz, "deflated": write_deflated}
Write = Callable[[Path, np.ndarray], Path]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_all_images_in_order_and_a_choice_of_them(write: Write, tmp_path: Path) -> None:
    images = pixels(11, 6, 10)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    path = write(tmp_path / "set", images)
    found = open_image_set(path, "images")
    assert (len(found), found.resolution, found.path) == (11, (6, 10), path)
    assert len(set(found.names)) == 11
    batches = list(found.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert torch.equal(torch.cat(batches), expected)
    assert batches[0].dtype == torch.uint8
    for indices in ([2, 3, 7], [10], [0], range(1, 11, 2)):
        assert torch.equal(torch.cat(list(found.batches(2, indices))), expected[list(indices)])
    assert list(found.batches(2, [])) == []
    for wrong in ([3, 2], [1, 1], [11], [-1]):
        with pytest.raises(ValueError, match="indices must ascend"):
            next(found.batches(2, wrong))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_hash_follows_contents_and_resolution(write: Write, tmp_path: Path) -> None:
    images = pixels(3)
    hashes = set()
    for turn in range(2):
        path = write(tmp_path / f"set{turn}", images)
        hashes.add(open_image_set(path, "images").source_hash)
    assert len(hashes) == 1, "a copy is the same set"
    hashes.add(open_image_set(path, "images", (4, 4)).source_hash)
    images[1, 0, 0, 0] ^= 1
    hashes.add(open_image_set(write(tmp_path / "changed", images), "images").source_hash)
    assert len(hashes) == 3


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_larger_images_are_box_averaged_as_the_dataset_does(write: Write, tmp_path: Path) -> None:
    images = pixels(5, 12, 12)
    path = write(tmp_path / "set", images)
    reduced = torch.cat(list(open_image_set(path, "images", (4, 4)).batches(2)))
    dataset = ImageDataset(write_zip(tmp_path / "same", images), 4)
    assert torch.equal(reduced, torch.stack([dataset[index][0] for index in range(5)]))
    for resolution in ((5, 5), (24, 24), (4, 6)):
        with pytest.raises(UserError, match=r"metrics\.reference.* 12x12; .* or a whole multiple"):
            open_image_set(path, "metrics.reference", resolution)


@pytest.mark.parametrize("count", [3, 40])
def test_mixed_sizes_are_reported_with_the_folder_and_the_remedy(tmp_path: Path, count: int) -> None:
    """At opening, where a few images are inspected, or at the image."""
    folder = write_folder(tmp_path / "set", pixels(count))
    odd = f"sub/{count - 1:03d}.png"
    Image.new("RGB", (16, 12)).save(folder / odd)

    def read() -> None:
        found = open_image_set(folder, "images")
        assert count == 40, "three images are all inspected"
        list(found.batches(2))

    with pytest.raises(UserError) as caught:
        read()
    assert str(caught.value) == (
        f"images={folder}: its images have several sizes ('sub/000.png' is 8x8, {odd!r} is 16x12); convert them to one "
        f"size and use that zip: `python -m relay_diffusion.cli.convert_images source={folder} destination=OUT.zip "
        "resolution=N classes=none`"
    )


def test_first_image_of_another_size_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", pixels(3))
    Image.new("RGB", (4, 4)).save(folder / "sub" / "002.png")
    with pytest.raises(UserError, match=r"'sub/002.png' in .* is 4x4; it must be 8x8 or a whole multiple"):
        list(open_image_set(folder, "images", (8, 8)).batches(2))


def test_subset_and_wrong_paths(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", pixels(3))
    Image.new("RGB", (8, 8)).save(folder / "top.png")
    assert len(open_image_set(folder, "images")) == 4
    assert open_image_set(folder, "images", subset="sub/").names == ["sub/000.png", "sub/001.png", "sub/002.png"]
    with pytest.raises(UserError, match=r"images=.*set: no images in its folder subset='other'"):
        open_image_set(folder, "images", subset="other")
    with pytest.raises(UserError, match=r"an \.npz has no folders"):
        open_image_set(write_npz(tmp_path / "a", pixels(1)), "images", subset="sub")
    with pytest.raises(UserError, match=r"images=.*absent\.npz: no such file"):
        open_image_set(tmp_path / "absent.npz", "images")


def npy(shape: tuple[int, ...], data: bytes, descr: str = "|u1", fortran_order: bool = False) -> bytes:
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": fortran_order, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def archive(content: bytes, name: str = "arr_0.npy", compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr(name, content)
    return stream.getvalue()


def pickled() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, np.array([{"a": 1}], dtype=object))
    return stream.getvalue()


GOOD = npy((2, 4, 4, 3), bytes(range(96)))
HOSTILE = {
    "text": (b"no archive", "not a readable"),
    "empty": (b"", "not a readable"),
    "cut short": (archive(GOOD)[:-40], "not a readable"),
    "no images": (archive(GOOD, "mu.npy"), "holds mu, but no images as 'arr_0'"),
    "not an array": (archive(b"\x80\x04."), "'arr_0' cannot be read"),
    "empty member": (archive(b""), "'arr_0' cannot be read"),
    "objects": (pickled(), "'arr_0' cannot be read"),
    "claims objects": (archive(npy((2, 4, 4, 3), bytes(768), "|O")), r"not object \[2, 4, 4, 3\]"),
    "code in the header": (
        archive(GOOD[:10] + b"__import__('os').abort()".ljust(117) + b"\n"),
        "'arr_0' cannot be read",
    ),
    "complex": (
        archive(npy((2, 4, 4, 3), bytes(768), "<c8")),
        r"must hold images \[N,H,W,C\] as uint8 or as floats .* not complex64 \[2, 4, 4, 3\]",
    ),
    "signed": (archive(npy((2, 4, 4, 3), bytes(96), "|i1")), "not int8"),
    "three dimensions": (archive(npy((2, 16, 3), bytes(96))), r"not uint8 \[2, 16, 3\]"),
    "two channels": (archive(npy((2, 4, 6, 2), bytes(96))), "its images have 2 channels, not 3"),
    "channels first": (archive(npy((2, 3, 2, 8), bytes(96))), "its images have 8 channels, not 3"),
    "no image": (archive(npy((0, 4, 4, 3), b"")), r"not uint8 \[0, 4, 4, 3\]"),
    "negative": (archive(npy((-2, -4, 4, 3), bytes(96))), r"not uint8 \[-2, -4, 4, 3\]"),
    "Fortran": (archive(npy((2, 4, 4, 3), bytes(96), fortran_order=True)), "in Fortran order"),
    "claims more": (archive(npy((3, 4, 4, 3), bytes(96))), r"uint8 of shape \[3, 4, 4, 3\] does not match the size"),
    "claims less": (archive(npy((1, 4, 4, 3), bytes(96))), "does not match the size"),
    "huge claim": (archive(npy((2**62, 2**62, 2**62, 3), bytes(96))), "does not match the size"),
    "huge images": (
        archive(npy((1, 2**14, 2**14, 3), bytes(3 * 2**28)), compression=zipfile.ZIP_DEFLATED),
        "its images are 16384x16384 with 3 channels, but at most 89,478,485 pixels and 1,024 channels are supported",
    ),
    "encrypted": (
        archive(GOOD).replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\x01\0"),
        "encrypted",
    ),
    "unknown compression": (
        archive(GOOD).replace(b"PK\x01\x02\x14\x03\x14\0\0\0\0\0", b"PK\x01\x02\x14\x03\x14\0\0\0\x63\0"),
        "'arr_0' cannot be read",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_inconsistent_files_are_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        open_image_set(path, "images")
    text = str(raised.value)
    assert text.startswith(f"images={path}")
    assert "\n" not in text


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_in_the_images_is_found(compression: int, tmp_path: Path) -> None:
    noise = pixels(8).tobytes()
    content = bytearray(archive(npy((8, 8, 8, 3), noise), compression=compression))
    content[len(content) // 2] ^= 255
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^images=.*samples\.npz: 'arr_0' cannot be read") as raised:
        list(open_image_set(path, "images").batches(3))
    assert "\n" not in str(raised.value)


def test_a_directory_with_a_larger_size_than_the_data(tmp_path: Path) -> None:
    """The archive's directory agrees with the header, but the compressed data end early."""
    whole, short = npy((9, 8, 8, 3), bytes(9 * 192)), npy((9, 8, 8, 3), bytes(4 * 192))
    content = bytearray(archive(short, compression=zipfile.ZIP_DEFLATED))
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = len(whole).to_bytes(4, "little")
    path = tmp_path / "samples.npz"
    path.write_bytes(content)
    found = open_image_set(path, "images")
    assert len(next(found.batches(4))) == 4
    with pytest.raises(UserError, match="'arr_0' cannot be read"):
        list(found.batches(4))


def test_an_npz_is_never_in_memory(tmp_path: Path) -> None:
    images = np.zeros((1500, 64, 64, 3), np.uint8)  # 18 MB
    found = open_image_set(write_deflated(tmp_path / "set", images), "images")
    tracemalloc.start()
    assert sum(len(batch) for batch in found.batches(8)) == 1500
    assert sum(len(batch) for batch in found.batches(8, range(5, 1500, 100))) == 15
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_arrays_of_an_npz_one_at_a_time(tmp_path: Path) -> None:
    arrays = {"mu": np.arange(6.0).reshape(2, 3), "n": np.int64(5), "layout": np.str_("NHWC")}
    arrays["turned"] = np.asfortranarray(arrays["mu"])
    np.savez(tmp_path / "a.npz", **arrays)
    npz = Npz(tmp_path / "a.npz", "option")
    assert npz.keys == list(arrays)
    for key, array in arrays.items():
        assert npz.header(key).shape == array.shape
        assert npz.read(key).shape == array.shape
        assert (npz.read(key) == array).all()
    fingerprint = npz.fingerprint()
    np.savez(tmp_path / "a.npz", **arrays | {"n": np.int64(6)})
    assert Npz(tmp_path / "a.npz", "option").fingerprint() != fingerprint
    np.savez(tmp_path / "a.npz", a=np.array([None]))
    with pytest.raises(UserError, match="'a' cannot be read"):
        Npz(tmp_path / "a.npz", "option").read("a")
