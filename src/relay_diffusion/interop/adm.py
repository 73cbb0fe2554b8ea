"""Sample files of the ADM evaluator: an .npz with the images as `arr_0` and, optionally, their classes as `arr_1`."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from relay_diffusion.files import whole_file


def write_adm_samples(
    path: str | Path,
    batches: Iterable[Tensor],
    count: int,
    resolution: tuple[int, int],
    labels: Sequence[int] | None = None,
) -> None:
    """Write uint8 batches [B,3,H,W] as `arr_0`, uint8 [count,H,W,3], and class indices as `arr_1`, int64 [count].

    The file appears whole or not at all, and no more than a batch is in memory. Raises ValueError unless just `count`
    images of size `resolution` (H, W) come, with as many labels.
    """
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    with whole_file(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        # The size must be known to be large before it is: force_zip64 allows for it.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *resolution, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for batch in batches:
                pixels = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if pixels.dtype != np.uint8 or pixels.shape[1:] != (*resolution, 3):
                    raise ValueError(f"expected uint8 [B,3,{resolution[0]},{resolution[1]}], not {list(batch.shape)}")
                written += len(pixels)
                member.write(pixels.tobytes())
        if written != count:
            raise ValueError(f"{written} images came where {count} were announced")
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64), allow_pickle=False)
