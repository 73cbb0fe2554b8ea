"""Export a stage as a folder: weights as safetensors, the rest as JSON.

    FOLDER/weights.safetensors   parameters of the denoiser
    FOLDER/stage.json            how to build the stage, and the SHA-256 of the weights

An export has no optimizer state and no position in the data. `load_stage(FOLDER)` reads it.

A relay is a folder of such exports and a relay.json that lists them in order. `load_relay(FOLDER)` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from relay_diffusion import __version__
from relay_diffusion.errors import UserError, require
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.utils.files import atomic_write, file_sha256, json_text, parse_json, write_text
from relay_diffusion.utils.messages import shorten

EXPORT_STAGE, EXPORT_WEIGHTS = "stage.json", "weights.safetensors"
EXPORT_FORMAT = 1
RELAY_FILE = "relay.json"  # in the folder of a relay
RELAY_FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_stage(
    stage_config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    destination: str | Path,
    class_names: Sequence[str] = (),
    images_seen: int = 0,
    origin: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    kind: str = "ema",
    text: Mapping[str, Any] | None = None,
) -> Path:
    """Write a stage to the folder `destination` and return the folder.

    An earlier export is replaced. `weights`: the state dict of the stage's denoiser. `kind`: "ema" or "raw". `dtype`:
    data type of the written weights, float32, float16 or bfloat16. `origin`: source of the weights, e.g. {"file": name,
    "sha256": ...}. `text`: the text encoder, as in StageInfo. stage.json is written last, so an interrupted export is
    never read. Raises UserError if the folder holds a training run, if the dtype is unknown, and if a weight is not
    finite in it.
    """
    destination = Path(destination).expanduser()
    if destination.exists() and not destination.is_dir():
        raise UserError(f"destination={destination}: is a file; give the name of a folder")
    for used in (*destination.glob("*.ckpt"), *destination.glob("checkpoints")):
        raise UserError(f"destination={destination}: holds a training run ({used.name}); choose another folder")
    tensors = _converted(weights, dtype)
    stage_file, weights_file = destination / EXPORT_STAGE, destination / EXPORT_WEIGHTS
    stage_file.unlink(missing_ok=True)
    with atomic_write(weights_file) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    content = {
        "format": EXPORT_FORMAT,
        "version": __version__,
        "weights": {"kind": kind, "dtype": dtype, "sha256": file_sha256(weights_file)},
        "origin": dict(origin or {}),
        "images_seen": images_seen,
        "class_names": list(class_names),
        **({} if text is None else {"text": dict(text)}),
        "stage_config": {key: value for key, value in stage_config.items() if key != "optimizer"},
    }
    write_text(stage_file, json_text(content))
    return destination


def export_loaded(
    stage: DiffusionStage, destination: str | Path, dtype: str = "float32", origin: Mapping[str, Any] | None = None
) -> Path:
    """Export a stage that `load_stage` has loaded.

    origin: as in `export_stage`; None: name and hash of the file that was loaded. Raises UserError as `export_stage`.
    """
    info = stage.info
    assert info.config is not None
    return export_stage(
        info.config,
        stage.denoiser.state_dict(),
        destination,
        class_names=info.class_names,
        images_seen=info.images_seen,
        origin=origin or {"file": Path(info.origin["file"]).name, "sha256": info.origin["sha256"]},
        dtype=dtype,
        text=info.text,
    )


def export_relay(
    stages: Mapping[str, DiffusionStage], destination: Path, dtype: str = "float32", consistency: bool = False
) -> None:
    """Export the stages of a relay, and write relay.json last.

    Each stage gets a folder of its name. consistency: of Relay. Raises UserError as `export_stage`, and for a name that
    cannot be a folder.
    """
    for name in stages:
        plain = re.fullmatch(r"\w[\w.-]*", name, re.ASCII)
        require(bool(plain), f"stage {shorten(name)}: letters, digits, '_', '-' and '.' make a name; rename it")
    for name, stage in stages.items():
        export_loaded(stage, destination / name, dtype)
    content = {"format": RELAY_FORMAT, "stages": {name: {"path": name} for name in stages}}
    content |= {"consistency": True} if consistency else {}
    write_text(destination / RELAY_FILE, json_text(content))


def _converted(weights: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: use one of {', '.join(DTYPES)}")
    converted = {}
    for name, tensor in weights.items():
        stored = tensor.detach().cpu().to(DTYPES[dtype]).contiguous()
        if not bool(stored.isfinite().all()):
            reason = f"too large for {dtype}: use bfloat16 or float32" if tensor.isfinite().all() else "not finite"
            raise UserError(f"dtype={dtype}: {name} holds weights that are {reason}")
        converted[name] = stored
    return converted


def read_export(file: Path) -> dict[str, Any]:
    """Read an export in the format of a checkpoint.

    `file`: its stage.json. Raises UserError naming the file.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if content["format"] != EXPORT_FORMAT:
            raise UserError(f"{file} is an export in format {content['format']!r}: this version reads {EXPORT_FORMAT}")
        kind, sha256 = content["weights"]["kind"], content["weights"]["sha256"]
        read = {key: content[key] for key in ("stage_config", "class_names", "images_seen")}
        kinds = {"stage_config": dict, "class_names": list, "images_seen": int}
        if kind not in ("raw", "ema") or not all(isinstance(read[key], kinds[key]) for key in kinds):
            raise TypeError
        read |= {"text": content["text"]} if "text" in content else {}  # without text, and in older files
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{file} cannot be read as an exported stage: it is damaged or another file; export again"
        ) from None
    weights = _read_weights(file.with_name(EXPORT_WEIGHTS), sha256)
    if kind == "ema":
        return read | {"ema": {"weights": weights}}
    return read | {"state_dict": {f"denoiser.{name}": tensor for name, tensor in weights.items()}}


def _read_weights(file: Path, sha256: str) -> dict[str, Tensor]:
    try:
        if file_sha256(file) != sha256:
            raise UserError(
                f"{file} does not hold the weights that {EXPORT_STAGE} describes: fetch or export both again"
            )
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: it belongs to {EXPORT_STAGE} beside it") from None
    except UserError:
        raise
    except Exception:  # safetensors raises many types for damaged files
        raise UserError(f"{file} cannot be read: it is damaged; export again") from None
