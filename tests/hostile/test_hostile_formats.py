"""Hostile parquet and arrow files and tar shards: one-line errors, bounded memory, no code."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from formats_on_disk import table, write_parquet
from pictures_on_disk import encoded, pixels, pngs, write_tar
from relay_diffusion.data.bounded_io import check_size
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.huggingface import HuggingFaceFormat
from relay_diffusion.data.sources import SourceFormat
from relay_diffusion.data.webdataset import WebDatasetFormat
from relay_diffusion.errors import UserError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

IMAGES = list(pngs([f"{number}.png" for number in range(6)]).values())
DAMAGED = [b"", b"no image", IMAGES[0][:40], encoded(pixels(0), "GIF")]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def refused(path: Path, format: SourceFormat, *words: str) -> None:
    """Check that every image of `path` is read, or one line has these words."""
    with pytest.raises(UserError) as caught:
        list(ImageDataset(path, 8, format=format))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data.dataset.path")
    for word in (*words, str(path)):
        assert word in message, message


# ---- parquet and arrow ----

ROWS = HuggingFaceFormat()


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_broken_image_of_a_row_is_named(tmp_path: Path, damaged: bytes) -> None:
    refused(write_parquet(tmp_path / "a.parquet", [*IMAGES[:3], damaged, *IMAGES]), ROWS, "'train[3]'")


@pytest.mark.parametrize("path", ["{folder}/secret.png", "http://127.0.0.1:9/a.png", None])
def test_a_path_in_a_row_is_not_followed(tmp_path: Path, path: str | None) -> None:
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    made = table(IMAGES)
    rows = made.column("image").to_pylist()
    rows[2] = {"bytes": None, "path": path and path.format(folder=tmp_path)}
    made = made.set_column(0, made.schema.field("image"), pyarrow.array(rows, made.schema.field("image").type))
    pyarrow.parquet.write_table(made, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", ROWS, "'train[2]'", "holds no bytes, and a path or URL is not followed")


def test_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": [IMAGES[0], None]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", ROWS, "'train[1]'", "holds no bytes")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 200 + b"PAR1", "cut"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_damaged_files(tmp_path: Path, content: bytes | str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with pyarrow.ipc.new_stream(str(path), table(IMAGES).schema) as file:
        file.write_table(table(IMAGES))
    whole = path.read_bytes() if suffix == "arrow" else write_parquet(path, IMAGES).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    refused(path, ROWS, "cannot be read")


def test_arrow_offsets_outside_of_the_file(tmp_path: Path) -> None:
    """Arrow itself trusts offsets, and would read memory that is not the file's."""
    made = pyarrow.table({"image": pyarrow.array(IMAGES, pyarrow.binary())})
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), made.schema) as file:
        file.write_table(made)
    content = (tmp_path / "a.arrow").read_bytes()
    start, end = sum(map(len, IMAGES[:-1])), sum(map(len, IMAGES))
    offsets = struct.pack("<2i", start, end)
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, struct.pack("<2i", start, 2**31 - 8)))
    refused(tmp_path / "a.arrow", ROWS, "cannot be read")


def test_a_small_file_of_many_equal_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would decode all of them at once."""
    pyarrow.parquet.write_table(table(IMAGES[:1] * 50_000), tmp_path / "a.parquet", compression="zstd")
    monkeypatch.setattr("relay_diffusion.data.huggingface.MAX_MEMBER", 2**20)
    refused(tmp_path / "a.parquet", ROWS, "'a.parquet' expands to more than 100 times its size")
    monkeypatch.setattr("relay_diffusion.data.huggingface.MAX_GROUP", 2**20)
    refused(tmp_path / "a.parquet", ROWS, "'a.parquet' has a row group of more than 1,048,576 bytes")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_large_values_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES, None, ["x" * 100] * 6)
    monkeypatch.setattr("relay_diffusion.data.huggingface.check_size", partial(check_size, most=300))
    dataset = ImageDataset(path, 8, format=HuggingFaceFormat(caption_column="text"))
    with pytest.raises(UserError, match=r"^data\.dataset\.path=.*: column 'text': it claims \d+ bytes, more than 300"):
        _ = dataset.captions
    monkeypatch.setattr("relay_diffusion.data.huggingface.check_size", partial(check_size, most=40))
    refused(path, ROWS, "'train[0]'", "it claims", "more than 40")


class Exploit:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["set.py", "data.pkl", "data.csv", "README.md"])
def test_no_code_of_a_data_set_runs(tmp_path: Path, name: str) -> None:
    folder, trace = tmp_path / "set", tmp_path / "trace"
    folder.mkdir()
    code = f"open({str(trace)!r}, 'w')\n".encode()
    (folder / name).write_bytes(pickle.dumps(Exploit(trace)) if name == "data.pkl" else code)
    refused(folder, ROWS, "holds no .parquet or .arrow file")
    write_parquet(folder / "train.parquet", IMAGES)
    if name == "set.py":
        refused(folder, ROWS, "scripts are no longer supported")
    elif name == "README.md":
        assert len(ImageDataset(folder, 8, format=ROWS)) == 6
    assert not trace.exists()


def test_only_files_of_the_folder_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train.parquet", IMAGES)
    write_parquet(tmp_path / "other.parquet", IMAGES)
    (folder / "data.pkl").write_bytes(b"")
    for file in ("../other.parquet", str(tmp_path / "other.parquet"), "data.pkl"):
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {file!r}\n---\n")
        refused(folder, ROWS)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: https://127.0.0.1:9/a.parquet\n---\n"
    )
    refused(folder, ROWS)


@pytest.mark.parametrize("outside", ["../other/data-00000-of-00001.arrow", "{folder}/other/data-00000-of-00001.arrow"])
def test_a_saved_set_reads_only_its_own_files(tmp_path: Path, outside: str) -> None:
    for name in ("set", "other"):
        datasets.Dataset(table(IMAGES)).save_to_disk(str(tmp_path / name))
    state = tmp_path / "set/state.json"
    name = outside.format(folder=tmp_path)
    state.write_text(state.read_text().replace("data-00000-of-00001.arrow", name))
    refused(tmp_path / "set", ROWS, "would read", "which is not in it")


# ---- tar shards ----

SHARDS = WebDatasetFormat()


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_broken_image_of_a_shard_is_named(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set/0.tar", {"0.png": IMAGES[0], "1.png": damaged})
    refused(tmp_path / "set", SHARDS, "'0.tar/1.png'")


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.png", "..\\a.png", "C:\\a.png", "../a.cls"])
def test_names_outside_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    refused(write_tar(tmp_path / "a.tar", {"good.png": IMAGES[0], name: IMAGES[0]}), SHARDS, repr(name), "leaves the")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_followed(tmp_path: Path, kind: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "b.png"):
            info = tarfile.TarInfo(name)
            info.size = len(IMAGES[0])
            archive.addfile(info, io.BytesIO(IMAGES[0]))
            other = tarfile.TarInfo(f"link-{name}")
            other.type, other.linkname = kind, "/etc/passwd"
            archive.addfile(other)
    assert ImageDataset(tmp_path / "a.tar", 8, format=SHARDS).names == ["a.tar/a.png", "a.tar/b.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]
    is_link = kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
    assert ("a.tar/link-b.png (link)" in capsys.readouterr().out) == is_link


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused(tmp_path: Path, mode: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": IMAGES[0]}, mode)
    refused(path, SHARDS, "the shard 'a.tar' is compressed, which allows no random access; decompress it")


@pytest.mark.parametrize("content", [b"", b"no tar", b"\xff" * 2048, "cut"])
def test_damaged_shards(tmp_path: Path, content: bytes | str) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": IMAGES[0], "1.png": bytes(10**5)})
    path.write_bytes(path.read_bytes()[:60_000] if isinstance(content, str) else content)
    refused(path, SHARDS, "the shard 'a.tar' cannot be read as a tar archive", "copy it again")


def test_a_damaged_header_does_not_hide_the_rest(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": image for number, image in enumerate(IMAGES)})
    content = bytearray(path.read_bytes())
    at = content.index(b"3.png")
    content[at + 148 : at + 156] = b"99999999"  # its checksum
    path.write_bytes(content)
    refused(path, SHARDS, f"the header at byte {at:,} is damaged")


def test_sizes_in_headers_allocate_no_memory(tmp_path: Path) -> None:
    large = tarfile.TarInfo("0.png")
    large.size = 2**40
    (tmp_path / "a.tar").write_bytes(large.tobuf(tarfile.GNU_FORMAT) + IMAGES[0])
    refused(tmp_path / "a.tar", SHARDS, "cannot be read")
    with (tmp_path / "a.tar").open("r+b") as file:  # a sparse file of that size
        file.truncate(2**40 + 4096)
    refused(tmp_path / "a.tar", SHARDS, "'a.tar/0.png'", "it claims 1,099,511,627,776 bytes")


def test_sparse_members_and_large_special_headers_are_refused(tmp_path: Path) -> None:
    for name, kind in (("sparse", tarfile.GNUTYPE_SPARSE), ("header", tarfile.XHDTYPE)):
        info = tarfile.TarInfo("0.png")
        info.type, info.size = kind, 2**21
        (tmp_path / f"{name}.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**21 + 1024))
        refused(tmp_path / f"{name}.tar", SHARDS, "cannot be read")


def test_a_name_twice_in_a_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("0.png"))
    refused(tmp_path / "a.tar", SHARDS, "holds 'a.tar/0.png' twice")
