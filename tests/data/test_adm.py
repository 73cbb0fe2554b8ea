"""ADM sample files, read back by numpy and `open_image_set`."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.npz import write_adm_samples


def test_round_trip(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (7, 3, 4, 6), dtype=torch.uint8)
    path = tmp_path / "new" / "samples.npz"
    write_adm_samples(path, images.split(3), 7, (4, 6), labels=range(7))
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == images.permute(0, 2, 3, 1).numpy()).all()
        assert arrays["arr_1"].dtype == np.int64
        assert arrays["arr_1"].tolist() == list(range(7))
    assert torch.equal(torch.cat(list(open_image_set(path, "images").batches(2))), images)
    copy = tmp_path / "copy.npz"
    found = open_image_set(path, "images")
    write_adm_samples(copy, found.batches(5), len(found), found.resolution)
    with np.load(copy) as arrays:
        assert arrays.files == ["arr_0"]
    assert [file.name for file in path.parent.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize(
    ("images", "count", "labels"),
    [
        (torch.zeros(3, 3, 4, 4, dtype=torch.uint8), 4, None),
        (torch.zeros(5, 3, 4, 4, dtype=torch.uint8), 4, None),
        (torch.zeros(4, 3, 4, 5, dtype=torch.uint8), 4, None),
        (torch.zeros(4, 3, 4, 4), 4, None),
        (torch.zeros(4, 3, 4, 4, dtype=torch.uint8), 4, [0, 1]),
    ],
    ids=["fewer", "more", "size", "float", "labels"],
)
def test_other_images_leave_no_file(images: Tensor, count: int, labels: list[int] | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images|expected uint8"):
        write_adm_samples(tmp_path / "samples.npz", images.split(2), count, (4, 4), labels)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow(tmp_path: Path) -> None:
    def batches() -> Iterator[Tensor]:
        for _ in range(60):
            yield torch.zeros(8, 3, 64, 64, dtype=torch.uint8)  # 98 kB; 6 MB in all

    tracemalloc.start()
    write_adm_samples(tmp_path / "samples.npz", batches(), 480, (64, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
